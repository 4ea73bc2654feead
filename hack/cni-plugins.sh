#!/usr/bin/env bash
# Builds the newest standard CNI plugins, and flannel's, from their Go modules for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/cni.
# Does nothing when they are there.
set -euo pipefail
plugins=v1.9.1
flannel=v0.9.1 # the last version of the standard plugins that has flannel's; it calls bridge of the new ones
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
versions="plugins $plugins flannel $flannel"
mkdir -p "$cache"
exec 9>"$cache/cni.lock"
flock 9
[ "$(cat "$cache/cni/versions" 2>/dev/null)" = "$versions" ] && exit 0
tmp=$(mktemp -d "$cache/cni.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
export GOBIN=$tmp GOFLAGS=-buildvcs=false CGO_ENABLED=0
cd /
of=github.com/containernetworking/plugins/plugins
go install -trimpath -ldflags '-s -w' "$of/main/bridge@$plugins" "$of/main/loopback@$plugins" "$of/main/macvlan@$plugins" "$of/main/ptp@$plugins" \
	"$of/ipam/host-local@$plugins" "$of/ipam/static@$plugins" \
	"$of/meta/portmap@$plugins" "$of/meta/bandwidth@$plugins" "$of/meta/firewall@$plugins" "$of/meta/tuning@$plugins"
go install -trimpath -ldflags '-s -w' "$of/meta/flannel@$flannel"
echo "$versions" > "$tmp/versions"
chmod 755 "$tmp"
rm -rf "$cache/cni"
mv "$tmp" "$cache/cni"
trap - EXIT
