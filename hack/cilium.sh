#!/usr/bin/env bash
# Builds Cilium and Helm from their Go modules for tests (test/cilium/go.mod), into
# ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test. Does nothing when they are there. bin has the programs under the names
# of Cilium's images; bpf, chart and scripts are copies from the module. Installs Debian's clang-19, which compiles the
# datapath on the nodes. A first build takes nine minutes of CPU and 3 GB of Go's build cache.
set -euo pipefail
helm=v3.22.0
script=$(realpath "$0")
"$(dirname "$script")/install-deps.sh" cilium
cd "$(dirname "$script")/../test/cilium"
of=github.com/cilium/cilium
version=$(sed -n "s#.*$of \(v[0-9.]*\).*#\1#p" go.mod | head -1)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
out=$cache/cilium-$version
mkdir -p "$cache"
exec 9>"$cache/cilium.lock"
flock 9
stamp=$(cat go.mod go.sum controllers/controllers.go "$script" | sha256sum)
[ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ] && exit 0

tmp=$(mktemp -d "$cache/cilium.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
mkdir "$tmp/bin" "$tmp/scripts"

# The operator's tag selects the allocators of addresses of the generic image.
go build -trimpath -tags ipam_provider_operator -ldflags "-s -w -X $of/pkg/version.ciliumVersion=${version#v}" \
	-o "$tmp/bin/" "$of"/{cilium-dbg,cilium-health,cilium-health/responder,daemon,operator,plugins/cilium-cni} \
	"$of"/tools/{mount,sysctlfix}
while read -r from to; do
	mv "$tmp/bin/$from" "$tmp/bin/$to"
done <<-END
	daemon cilium-agent
	operator cilium-operator-generic
	responder cilium-health-responder
	mount cilium-mount
	sysctlfix cilium-sysctlfix
END

module=$(go list -m -f '{{.Dir}}' "$of")
cp -r --no-preserve=mode "$module/bpf" "$tmp/bpf"
rm -rf "$tmp/bpf/tests"
cp -r --no-preserve=mode "$module/install/kubernetes/cilium" "$tmp/chart"
install -m 755 "$module/images/cilium/init-container.sh" "$module"/plugins/cilium-cni/*.sh "$tmp/scripts/"
(cd / && GOBIN=$tmp/bin go install -trimpath -ldflags "-s -w" "helm.sh/helm/v3/cmd/helm@$helm")

echo "$stamp" > "$tmp/stamp"
chmod 755 "$tmp"
rm -rf "$out"
mv "$tmp" "$out"
trap - EXIT
