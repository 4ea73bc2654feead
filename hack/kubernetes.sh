#!/usr/bin/env bash
# Builds parts of Kubernetes from its Go modules (test/kubernetes/go.mod) for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test.
# Does nothing when they are there. Arguments: kubelet; cluster, all that a cluster made by kubeadm runs; e2e-node, the conformance suite of nodes.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/../test/kubernetes"
version=$(sed -n 's#.*k8s.io/kubernetes \(v[0-9.]*\).*#\1#p' go.mod | head -1)
metrics=v0.9.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
out=$cache/kubernetes-$version
mkdir -p "$out"
exec 9>"$cache/kubernetes.lock"
flock 9
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
minor=${version#v1.}
flags="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags="$flags -X $p.gitVersion=$version -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*} -X $p.gitTreeState=archive -X $p.gitCommit=0000000000000000000000000000000000000000 -X $p.buildDate=2026-01-01T00:00:00Z"
done

# build FOLDER PACKAGE...: one call compiles what they share once
build() { go build -trimpath -ldflags "$flags" -o "$@"; }

# Flannel's main package with the vxlan backend only: others need cgo, or the clients of clouds.
flanneld() {
	local src
	go mod download github.com/flannel-io/flannel
	src=$(go list -m -f '{{.Dir}}' github.com/flannel-io/flannel)
	grep -vE '^\s_ .*/pkg/backend/' "$src/main.go" | sed 's#^import (#&\n\t_ "github.com/flannel-io/flannel/pkg/backend/vxlan"#' > "$1/main.go"
	echo "{\"Replace\": {\"$PWD/flanneld/main.go\": \"$1/main.go\"}}" > "$1/overlay.json"
	build "$1/" -overlay "$1/overlay.json" ./flanneld
	rm "$1/main.go" "$1/overlay.json"
}

stamp=$(cat go.mod coredns/main.go "$script" | sha256sum)
for set in "$@"; do
	[ "$(cat "$out/$set.stamp" 2>/dev/null)" = "$stamp" ] && continue
	tmp=$(mktemp -d "$out/tmp.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	case $set in
	kubelet) build "$tmp/" k8s.io/kubernetes/cmd/kubelet ;;
	cluster)
		build "$tmp/" k8s.io/kubernetes/cmd/{kubeadm,kubectl,kube-apiserver,kube-controller-manager,kube-scheduler,kube-proxy} \
			go.etcd.io/etcd/server/v3 ./coredns
		mv "$tmp/server" "$tmp/etcd"
		flanneld "$tmp"
		(cd / && GOBIN=$tmp go install -trimpath -ldflags "-s -w" "sigs.k8s.io/metrics-server/cmd/metrics-server@$metrics") # needs newer modules than Kubernetes
		;;
	e2e-node)
		build "$tmp/" k8s.io/kubernetes/test/images/agnhost github.com/onsi/ginkgo/v2/ginkgo
		go test -c -trimpath -ldflags "$flags" -o "$tmp/e2e_node.test" k8s.io/kubernetes/test/e2e_node
		;;
	*) echo "kubernetes.sh: $set is none of kubelet, cluster, e2e-node" >&2; exit 1 ;;
	esac
	mv "$tmp"/* "$out/"
	rmdir "$tmp"
	trap - EXIT
	echo "$stamp" > "$out/$set.stamp"
done
