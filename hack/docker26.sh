#!/usr/bin/env bash
# Unpacks Docker Engine 26.1.5 with containerd and runc from Debian 13's packages for tests, into
# ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/docker-26. Does nothing when it is there. The packages come from the machine's own Debian mirror; apt checks
# their signatures with the keys of debian-archive-keyring. The machine's apt lists and packages do not change. MIRROR=http://… names another mirror.
# lib/ has the C library that runc needs; setup.sh of test/engines mounts it.
set -euo pipefail
suite=trixie docker='26.1.5*' containerd='1.7.24*' runc='1.1.15*'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test
keys=/usr/share/keyrings/debian-archive-keyring.gpg
arch=$(dpkg --print-architecture)
versions="suite $suite docker $docker containerd $containerd runc $runc libc6 $arch"
mkdir -p "$cache"
exec 9>"$cache/docker-26.lock"
flock 9
[ "$(cat "$cache/docker-26/versions" 2>/dev/null)" = "$versions" ] && exit 0
[ -s "$keys" ] || { echo "docker26.sh: $keys is missing; install debian-archive-keyring" >&2; exit 1; }

# The first archive of Debian itself in the machine's sources, not that of security updates or of another vendor.
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$' || true)}
mirror=${mirror:-http://deb.debian.org/debian}

tmp=$(mktemp -d "$cache/docker-26.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/apt/lists/partial" "$tmp/apt/archives/partial" "$tmp/root" "$tmp/engine/lib"
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
