#!/usr/bin/env bash
# Unpacks criu with its libraries from Debian 13's packages for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/criu. Does nothing when it
# is there. The criu of Debian 12 is too old for new kernels. MIRROR=http://… names a mirror.
set -euo pipefail
. "$(dirname "$0")/debian13.sh"
version='4.1*'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
stamp="suite $suite criu $version $arch"
mkdir -p "$cache"
exec 9>"$cache/criu.lock"
flock 9
[ "$(cat "$cache/criu/version" 2>/dev/null)" = "$stamp" ] && exit 0

tmp=$(mktemp -d "$cache/criu.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/root" "$tmp/criu/lib"
prepare_apt "$tmp"
# With an empty status, these are criu and everything it depends on.
apt-get -qq -y --no-install-recommends --download-only install "criu=$version" >/dev/null
for deb in "$tmp"/apt/archives/*.deb; do dpkg-deb -x "$deb" "$tmp/root"; done
mv "$(find "$tmp/root/usr" -path '*bin/criu' -type f)" "$tmp/criu/program"
cp -a "$tmp"/root/usr/lib/*-linux-gnu/*.so* "$tmp/criu/lib/"
loader=$(cd "$tmp/criu/lib" && ls ld-linux*.so.*)
cat > "$tmp/criu/criu" <<EOF
#!/bin/sh
exec "$cache/criu/lib/$loader" --library-path "$cache/criu/lib" "$cache/criu/program" "\$@"
EOF
chmod 755 "$tmp/criu/criu" "$tmp/criu"
echo "$stamp" > "$tmp/criu/version"
rm -rf "$cache/criu"
mv "$tmp/criu" "$cache/criu"
