#!/usr/bin/env bash
# Builds a static busybox from the distribution's source package for images of tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/busybox.
# Does nothing if it exists. The distribution's busybox-static lacks nmeter and nc for UDP, its shell prefers its own applets to programs of
# the image, and its wget crashes with a timeout. Needs apt, gcc and make.
set -euo pipefail
script=$(realpath "$0")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
mkdir -p "$cache"
exec 9>"$cache/busybox.lock"
flock 9
stamp=$(sha256sum < "$script")
[ "$(cat "$cache/busybox/stamp" 2>/dev/null)" = "$stamp" ] && exit 0
tmp=$(mktemp -d "$cache/busybox.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# The source repositories of the distribution, in a configuration of our own. Others of this machine may have no sources.
mkdir -p "$tmp/sources" "$tmp/lists/partial" "$tmp/archives/partial" "$tmp/src"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
	[ ! -e "$file" ] || sed -n 's/^deb /deb-src /p' "$file" > "$tmp/sources/$(basename "$file" .list).list"
done
for file in /etc/apt/sources.list.d/*.sources; do
	[ ! -e "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" > "$tmp/sources/$(basename "$file")"
done
apt() {
	apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$tmp/sources" -o Dir::State::Lists="$tmp/lists" \
		-o Dir::Cache::Archives="$tmp/archives" -o Dir::Cache::srcpkgcache= -o Dir::Cache::pkgcache= -o APT::Sandbox::User=root "$@"
}
apt update || true
(cd "$tmp" && apt source --download-only busybox)
tar -xf "$tmp"/busybox_*.orig.tar.* -C "$tmp/src" --strip-components=1

cd "$tmp/src"
make defconfig > "$tmp/log" 2>&1
# tc needs headers that newer kernels have removed.
sed -i 's/.*CONFIG_STATIC[ =].*/CONFIG_STATIC=y/; s/^CONFIG_TC=y/# CONFIG_TC is not set/; /^CONFIG_FEATURE_TC_INGRESS=/d' .config
sed -i 's/.*CONFIG_NC_110_COMPAT.*/CONFIG_NC_110_COMPAT=y/' .config
(yes '' || true) | make oldconfig >> "$tmp/log" 2>&1
make -j"$(nproc)" busybox >> "$tmp/log" 2>&1 || { tail -20 "$tmp/log" >&2; exit 1; }
mkdir "$tmp/out"
cp busybox "$tmp/out/busybox"
echo "$stamp" > "$tmp/out/stamp"
chmod 755 "$tmp/out"
rm -rf "$cache/busybox"
mv "$tmp/out" "$cache/busybox"
