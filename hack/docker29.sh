#!/usr/bin/env bash
# Builds Docker Engine 29 from its Go modules for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/docker-29. Does nothing when it is
# there. Needs Go, gcc, pkg-config and libseccomp-dev.
set -euo pipefail
moby=v2.0.0-beta.24 containerd=v2.4.2 runc=v1.5.2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
version=29.0.0-test # dockerd calls itself library-import else
versions="version $version moby $moby containerd $containerd runc $runc"
mkdir -p "$cache"
exec 9>"$cache/docker-29.lock"
flock 9
[ "$(cat "$cache/docker-29/versions" 2>/dev/null)" = "$versions" ] && exit 0
tmp=$(mktemp -d "$cache/docker-29.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
export GOBIN=$tmp GOFLAGS=-buildvcs=false
cd /
install() { go install -trimpath -ldflags "-s -w -X github.com/moby/moby/v2/dockerversion.Version=$version" "$@"; }
install "github.com/moby/moby/v2/cmd/dockerd@$moby"
install "github.com/containerd/containerd/v2/cmd/containerd@$containerd"
install "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$containerd"
install -tags seccomp "github.com/opencontainers/runc@$runc"
echo "$versions" > "$tmp/versions"
chmod 755 "$tmp"
rm -rf "$cache/docker-29"
mv "$tmp" "$cache/docker-29"
trap - EXIT
