#!/usr/bin/env bash
# Installs what is missing from the distribution's packages for the demo (no argument), for all tests ("test"), or in
# addition for a cluster with Cilium ("cilium").
set -euo pipefail
packages="docker.io containernetworking-plugins iptables iproute2 ca-certificates"
if [ "${1:-}" = test ]; then
	packages="$packages busybox-static gcc libc6-dev pkg-config libseccomp-dev util-linux procps qemu-user-static"
	packages="$packages systemd dbus man-db curl lintian rpm rpmlint apt-utils createrepo-c gnupg debian-archive-keyring"
elif [ "${1:-}" = cilium ]; then
	packages="clang-19 ipset bpftool"
fi
missing=
for p in $packages; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
# Docker's own packages conflict with docker.io and serve as well.
if command -v dockerd >/dev/null && [ "${1:-}" != test ]; then missing=${missing/ docker.io/}; fi
[ -z "$missing" ] && exit 0
[ "$(id -u)" = 0 ] || { echo "these packages are missing; install them as root: apt-get install$missing" >&2; exit 1; }
echo "installing$missing"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends $missing >/dev/null
