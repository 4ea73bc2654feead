#!/usr/bin/env bash
# Unpacks criu with its libraries from Debian 13's packages for tests, into ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/criu. Does nothing when it
# is there. The criu of Debian 12 is too old for new kernels. The packages come from the machine's own Debian mirror; apt checks their
# signatures with the keys of debian-archive-keyring. The machine's apt lists and packages do not change. MIRROR=http://… names another mirror.
set -euo pipefail
suite=trixie version='4.1*'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
keys=/usr/share/keyrings/debian-archive-keyring.gpg
arch=$(dpkg --print-architecture)
stamp="suite $suite criu $version $arch"
mkdir -p "$cache"
exec 9>"$cache/criu.lock"
flock 9
[ "$(cat "$cache/criu/version" 2>/dev/null)" = "$stamp" ] && exit 0
[ -s "$keys" ] || { echo "criu.sh: $keys is missing; install debian-archive-keyring" >&2; exit 1; }

# The first archive of Debian itself in the machine's sources, not that of security updates or of another vendor.
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$' || true)}
mirror=${mirror:-http://deb.debian.org/debian}

tmp=$(mktemp -d "$cache/criu.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/apt/lists/partial" "$tmp/apt/archives/partial" "$tmp/root" "$tmp/criu/lib"
: > "$tmp/apt/status"
echo "deb [arch=$arch signed-by=$keys] $mirror $suite main" > "$tmp/apt/sources.list"
cat > "$tmp/apt.conf" <<EOF
Dir::Etc::SourceList "$tmp/apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "$tmp/apt/lists";
Dir::State::Status "$tmp/apt/status";
Dir::Cache "$tmp/apt";
Dir::Cache::Archives "$tmp/apt/archives";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "";
APT::Get::List-Cleanup "false";
EOF
export APT_CONFIG=$tmp/apt.conf
apt-get -qq update
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
