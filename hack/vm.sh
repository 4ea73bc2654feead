#!/usr/bin/env bash
# Prepares make vm. Needs root and a Debian machine.
#   guest  builds the disk of the virtual machine in ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test/vm: disk.img, vmlinuz,
#          initrd, and key, the guest's SSH key. Does nothing when they are there.
#   host   installs what the steps need on this machine
# Environment:
#   MIRROR  Debian mirror for the guest (the one that apt of this machine uses)
set -euo pipefail
suite=bookworm
services="docker.io containerd apparmor containernetworking-plugins busybox-static criu iproute2 iptables jq kmod
	procps"
system="systemd systemd-sysv dbus udev openssh-server ca-certificates curl strace less linux-image-cloud-amd64"

install_packages() {
	local missing=
	for p in "$@"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
	done
	[ -n "$missing" ] || return 0
	echo "installing$missing"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=300 \
		--no-install-recommends $missing >/dev/null
}

# configure ROOT: network, SSH, and no background jobs of the distribution
configure() {
	local root=$1
	echo cri-vm > "$root/etc/hostname"
	printf '127.0.0.1 localhost\n127.0.1.1 cri-vm\n::1 localhost\n' > "$root/etc/hosts"
	echo '/dev/vda / ext4 defaults 0 1' > "$root/etc/fstab"
	printf '[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n' > "$root/etc/systemd/network/10-eth0.network"
	echo 'nameserver 10.0.2.3' > "$root/etc/resolv.conf"
	printf 'UseDNS no\nUsePAM no\n' > "$root/etc/ssh/sshd_config.d/vm.conf"
	mkdir -p "$root/etc/systemd/journald.conf.d"
	printf '[Journal]\nStorage=persistent\nSystemMaxUse=200M\nRateLimitIntervalSec=0\n' \
		> "$root/etc/systemd/journald.conf.d/vm.conf"
	mkdir -m 700 "$root/root/.ssh"
	cp key.pub "$root/root/.ssh/authorized_keys"
	chroot "$root" systemctl --quiet enable systemd-networkd ssh
	chroot "$root" systemctl --quiet mask systemd-networkd-wait-online apt-daily.timer apt-daily-upgrade.timer \
		e2scrub_all.timer fstrim.timer dpkg-db-backup.timer
	# The initramfs has only the modules of the disk.
	echo MODULES=list > "$root/etc/initramfs-tools/conf.d/vm"
	printf 'virtio_pci\nvirtio_blk\next4\n' > "$root/etc/initramfs-tools/modules"
	chroot "$root" update-initramfs -u
}

guest() {
	local cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test stamp tmp mirror
	mkdir -p "$cache/vm"
	exec 9>"$cache/vm.lock"
	flock 9
	install_packages qemu-system-x86 qemu-utils debootstrap openssh-client e2fsprogs
	stamp=$(sha256sum < "$script")
	[ "$(cat "$cache/vm/stamp" 2>/dev/null)" != "$stamp" ] || return 0

	mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' "Codename: $suite" | head -n 1)}
	[ -n "$mirror" ] || { echo "vm.sh: apt has no mirror of Debian $suite; set MIRROR=URL" >&2; exit 1; }
	tmp=$(mktemp -d "$cache/vm.XXXXXX")
	trap "rm -rf --one-file-system '$tmp'" EXIT
	cd "$tmp"
	ssh-keygen -q -t ed25519 -N '' -C cri-vm -f key
	echo "building the guest's disk from $mirror; log: $cache/vm/build.log"
	{
		debootstrap --variant=minbase --include="$(echo $system $services | tr ' ' ,)" $suite root "$mirror"
		configure root
	} > "$cache/vm/build.log" 2>&1 || { tail -n 20 "$cache/vm/build.log" >&2; exit 1; }
	cp root/boot/vmlinuz-* vmlinuz
	cp root/boot/initrd.img-* initrd
	rm -rf root/var/cache/apt/archives/*.deb
	mkfs.ext4 -q -d root -L root disk.img 12G
	rm -rf --one-file-system root
	mv disk.img vmlinuz initrd key "$cache/vm/"
	echo "$stamp" > "$cache/vm/stamp"
}

script=$(realpath "$0")
[ "$(id -u)" = 0 ] || { echo "vm.sh: run it as root" >&2; exit 1; }
case ${1:-} in
guest) guest ;;
host) install_packages $services ;;
*) echo "vm.sh: the argument is guest or host" >&2; exit 1 ;;
esac
