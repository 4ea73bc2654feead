#!/usr/bin/env bash
# Builds parts of Kubernetes from its Go modules for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/kubernetes-VERSION.
# Does nothing if they exist. KUBERNETES selects the version. Each go.mod in test/kubernetes and its directories has one;
# the default is the one of test/kubernetes/go.mod. Without an argument it prints the version. Arguments:
#   kubelet
#   cluster   the programs of a cluster made by kubeadm, and its add-ons; the add-ons have one version for all of Kubernetes
#   e2e-node  Kubernetes' suite for nodes, only in the default version
#   e2e       Kubernetes' suite for clusters, only in the default version
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/../test/kubernetes"
metrics=v0.9.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test

# Prints the version of Kubernetes in a go.mod. Its requirement is a line or part of a block, with or without a comment.
version_in() { awk '{ for (i = 1; i < NF; i++) if ($i == "k8s.io/kubernetes") { print $(i + 1); exit } }' "$1"; }

default=$(version_in go.mod)
wanted=${KUBERNETES:-$default} version='' known=''
for mod in go.mod */go.mod; do
	v=$(version_in "$mod")
	known="$known ${v#v}"
	[ "$v" != "v${wanted#v}" ] || { version=$v module=$(dirname "$mod"); }
done
[ -n "$version" ] || { echo "kubernetes.sh: KUBERNETES=$wanted is none of$known" >&2; exit 1; }
[ $# -gt 0 ] || { echo "$version"; exit; }
out=$cache/kubernetes-$version addons=$cache/kubernetes-$default
mkdir -p "$out" "$addons"
exec 9>"$cache/kubernetes.lock"
flock 9
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
minor=${version#v1.}
flags="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags="$flags -X $p.gitVersion=$version -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*} -X $p.gitTreeState=archive -X $p.gitCommit=0000000000000000000000000000000000000000 -X $p.buildDate=2026-01-01T00:00:00Z"
done

# build DIRECTORY PACKAGE...: one call compiles shared packages once
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

# suite NAME DIRECTORY: a suite with our record of its progress. Files cannot be added to a downloaded package, so the
# package is compiled as one of this module, with a copy of go.mod for the requirements of its tests.
suite() {
	local src file
	src=$(go list -f '{{.Dir}}' "k8s.io/kubernetes/test/$1")
	printf 'package %s\n\nimport _ "%s/progress"\n' "${1/_/}" "$(go list -m)" > "$2/progress.go"
	{
		echo "{\"Replace\": {\"$PWD/$1/progress_test.go\": \"$2/progress.go\""
		for file in "$src"/*.go; do echo ", \"$PWD/$1/${file##*/}\": \"$file\""; done
		echo '}}'
	} > "$2/overlay.json"
	cp go.mod "$2/suite.mod"
	cp go.sum "$2/suite.sum"
	go test -c -vet=off -trimpath -ldflags "$flags" -mod=mod -modfile "$2/suite.mod" -overlay "$2/overlay.json" -o "$2/$1.test" "./$1"
	rm "$2/progress.go" "$2/overlay.json" "$2/suite.mod" "$2/suite.sum"
}

# Builds a set into a directory.
build_set() {
	case $1 in
	kubelet) build "$2/" k8s.io/kubernetes/cmd/kubelet ;;
	cluster) build "$2/" k8s.io/kubernetes/cmd/{kubeadm,kubectl,kube-apiserver,kube-controller-manager,kube-scheduler,kube-proxy} ;;
	addons)
		build "$2/" go.etcd.io/etcd/server/v3 ./coredns
		mv "$2/server" "$2/etcd"
		flanneld "$2"
		(cd / && GOBIN=$2 go install -trimpath -ldflags "-s -w" "sigs.k8s.io/metrics-server/cmd/metrics-server@$metrics") # needs newer modules than Kubernetes
		;;
	e2e-node)
		build "$2/" k8s.io/kubernetes/test/images/{agnhost,nonewprivs} github.com/onsi/ginkgo/v2/ginkgo
		suite e2e_node "$2"
		;;
	e2e)
		build "$2/" k8s.io/kubernetes/test/images/{agnhost,nonewprivs} github.com/onsi/ginkgo/v2/ginkgo
		suite e2e "$2"
		;;
	*) echo "kubernetes.sh: $1 is none of kubelet, cluster, e2e-node, e2e" >&2; exit 1 ;;
	esac
}

# ensure SET MODULE DIRECTORY: builds a set unless the directory has it from the same sources
ensure() (
	cd "$2"
	case $1 in
	addons) stamp=$(cat go.mod coredns/main.go "$script" | sha256sum) ;;
	e2e*) stamp=$(cat go.mod progress/progress.go "$script" | sha256sum) ;;
	*) stamp=$(cat go.mod "$script" | sha256sum) ;;
	esac
	[ "$(cat "$3/$1.stamp" 2>/dev/null)" != "$stamp" ] || exit 0
	tmp=$(mktemp -d "$3/tmp.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	build_set "$1" "$tmp"
	mv "$tmp"/* "$3/"
	echo "$stamp" > "$3/$1.stamp"
)

for set in "$@"; do
	ensure "$set" "$module" "$out"
	[ "$set" = cluster ] || continue
	ensure addons . "$addons"
	[ "$out" = "$addons" ] || ln -f "$addons"/{etcd,coredns,flanneld,metrics-server} "$out/"
done
