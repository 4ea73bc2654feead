#!/usr/bin/env bash
# Builds the real kubelet from its Go module (test/e2e/kubelet/go.mod) for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test. Does
# nothing when it is there.
set -euo pipefail
cd "$(dirname "$0")/../test/e2e/kubelet"
version=$(sed -n 's#.*k8s.io/kubernetes \(v[0-9.]*\).*#\1#p' go.mod | head -1)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
mkdir -p "$cache"
exec 9>"$cache/kubelet.lock"
flock 9
[ -x "$cache/kubelet-$version" ] && exit 0
minor=${version#v1.}
flags="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags="$flags -X $p.gitVersion=$version -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*} -X $p.gitTreeState=archive -X $p.gitCommit=0000000000000000000000000000000000000000 -X $p.buildDate=2026-01-01T00:00:00Z"
done
CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -trimpath -ldflags "$flags" -o "$cache/kubelet.new" k8s.io/kubernetes/cmd/kubelet
mv "$cache/kubelet.new" "$cache/kubelet-$version"
