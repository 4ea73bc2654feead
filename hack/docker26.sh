#!/usr/bin/env bash
# Unpacks Docker Engine 26.1.5 with containerd and runc from Debian 13's packages for tests, into
# ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/docker-26. Does nothing when it is there. MIRROR=http://… names a mirror.
# lib/ has the C library that runc needs; setup.sh of test/engines mounts it.
set -euo pipefail
. "$(dirname "$0")/debian13.sh"
docker='26.1.5*' containerd='1.7.24*' runc='1.1.15*'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
versions="suite $suite docker $docker containerd $containerd runc $runc libc6 $arch"
mkdir -p "$cache"
exec 9>"$cache/docker-26.lock"
flock 9
[ "$(cat "$cache/docker-26/versions" 2>/dev/null)" = "$versions" ] && exit 0

tmp=$(mktemp -d "$cache/docker-26.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/root" "$tmp/engine/lib"
prepare_apt "$tmp"
cd "$tmp/apt/archives"
apt-get -qq download "docker.io=$docker" "containerd=$containerd" "runc=$runc" libc6
for deb in *.deb; do dpkg-deb -x "$deb" "$tmp/root"; done
for p in dockerd containerd containerd-shim-runc-v2 runc; do
	mv "$(find "$tmp"/root/usr/*bin -name "$p" -type f)" "$tmp/engine/"
done
cp -a "$tmp"/root/usr/lib/*-linux-gnu/*.so* "$tmp/engine/lib/"
echo "$versions" > "$tmp/engine/versions"
chmod 755 "$tmp/engine"
rm -rf "$cache/docker-26"
mv "$tmp/engine" "$cache/docker-26"
