#!/usr/bin/env bash
# Installs cri-dockerd from a release, and removes such an installation. docs/install.md explains it.
set -euo pipefail
umask 022

usage() {
	cat <<'END'
Usage:
  install.sh [--version VERSION] [--prefix DIR] RELEASE
  install.sh --program FILE [--prefix DIR]
  install.sh --uninstall [--prefix DIR]

RELEASE is a directory or an http(s) URL with the files of a release. The files for this machine are
checked against SHA256SUMS of the release before anything is installed.

  --version VERSION  release to install, if RELEASE has more than one
  --prefix DIR       install below DIR (default /usr/local)
  --program FILE     install a program built from this source tree, and the containerd shim if it is
                     in the same directory (make install)
  --uninstall        remove the files of an installation below the prefix

Environment:
  DESTDIR  directory that replaces / in all paths, for packages (default empty)
  UNITDIR  directory of systemd units (default PREFIX/lib/systemd/system for /usr and /usr/local,
           otherwise /etc/systemd/system)
END
}

shim="containerd-shim-cri-dockerd-v1 containerd-shim-cri-dockerd-server"
units="cri-docker-log.socket cri-docker-log.service cri-docker.socket cri-docker.service"
config=/etc/default/cri-docker

fail() {
	echo "install.sh: $*" >&2
	exit 1
}

main() {
	local version='' prefix=/usr/local program='' uninstall='' release=''
	while [ $# -gt 0 ]; do
		case $1 in
		--version | --prefix | --program)
			[ $# -gt 1 ] || fail "$1 needs a value"
			[ -n "$2" ] || fail "$1 has an empty value"
			printf -v "${1#--}" %s "$2"
			shift
			;;
		--uninstall) uninstall=1 ;;
		-h | --help) usage && exit ;;
		-*) fail "unknown option $1; install.sh --help lists the options" ;;
		*)
			[ -z "$release" ] || fail "more than one release: $release, $1"
			release=$1
			;;
		esac
		shift
	done

	# The prefix becomes part of unit files, which have their own quoting.
	[[ $prefix =~ ^/[A-Za-z0-9._/+-]*$ ]] || fail "prefix $prefix: want an absolute path of letters, digits and ._+-"
	prefix=${prefix%/}
	DESTDIR=${DESTDIR:-}
	manifest=$prefix/share/cri-dockerd/manifest
	case $prefix in
	/usr | /usr/local) UNITDIR=${UNITDIR:-$prefix/lib/systemd/system} ;;
	*) UNITDIR=${UNITDIR:-/etc/systemd/system} ;;
	esac

	if [ -n "$uninstall" ]; then
		[ -z "$release$program$version" ] || fail "--uninstall takes no release, program or version"
		uninstall_files
		return
	fi

	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	mkdir "$tmp/files"
	if [ -n "$program" ]; then
		[ -z "$release$version" ] || fail "--program takes no release or version"
		[ -f "$program" ] || fail "$program does not exist; run make build first"
		copy_source "$program"
	else
		[ -n "$release" ] || fail "no release given; install.sh --help explains the arguments"
		get_release "${release%/}" "$version"
	fi
	stage "$prefix"
	install_files
	print_next_steps "$prefix"
}

# copy_source PROGRAM: collects the built programs and the units of this source tree in $tmp/files.
copy_source() {
	local source name
	source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
	cp "$1" "$tmp/files/cri-dockerd"
	for name in $shim; do
		[ ! -f "$(dirname "$1")/$name" ] || cp "$(dirname "$1")/$name" "$tmp/files"
	done
	cp "$source"/deploy/systemd/* "$source/deploy/package/default" "$tmp/files"
}

# get_release RELEASE VERSION: downloads and verifies a release, and unpacks it into $tmp/files.
get_release() {
	local release=$1 version=$2 arch found archive name
	case $(uname -m) in
	x86_64) arch=amd64 ;;
	aarch64 | arm64) arch=arm64 ;;
	*) fail "no release for the architecture $(uname -m); releases exist for x86_64 and aarch64" ;;
	esac

	fetch "$release" SHA256SUMS
	if [ -z "$version" ]; then
		found=$(sed -nE "s/^[0-9a-f]{64} [ *]cri-dockerd-(.*)\.$arch\.tgz$/\1/p" "$tmp/SHA256SUMS")
		[ -n "$found" ] || fail "$release/SHA256SUMS has no checksum of cri-dockerd-VERSION.$arch.tgz"
		[ "$(wc -l <<<"$found")" = 1 ] || fail "$release has several versions; select one with --version:" $found
		version=$found
	fi
	[[ $version =~ ^[A-Za-z0-9][A-Za-z0-9.+~-]*$ ]] || fail "$version is not a version"

	for name in "$arch" "$arch.shim" units; do
		archive=cri-dockerd-$version.$name.tgz
		fetch "$release" "$archive"
		verify "$release" "$archive"
	done

	unpack "cri-dockerd-$version.$arch.tgz" cri-dockerd
	unpack "cri-dockerd-$version.$arch.shim.tgz" $shim
	unpack "cri-dockerd-$version.units.tgz" $units default
}

# fetch RELEASE FILE: copies or downloads a file to $tmp.
fetch() {
	local url=$1/$2 message
	case $1 in
	http://* | https://*)
		if command -v curl >/dev/null; then
			message=$(curl -fsSL --proto =http,https --retry 2 -o "$tmp/$2" "$url" 2>&1) || fail "download $url: $message"
		elif command -v wget >/dev/null; then
			message=$(wget -nv --tries=3 -O "$tmp/$2" "$url" 2>&1) || fail "download $url: $message"
		else
			fail "download $url: neither curl nor wget is installed"
		fi
		;;
	*://*) fail "$1: want a directory or an http(s) URL" ;;
	*) message=$(cp "$url" "$tmp/$2" 2>&1) || fail "copy $url: $message" ;;
	esac
}

# verify RELEASE FILE: compares the checksum of a file in $tmp with SHA256SUMS.
verify() {
	local want got
	want=$(awk -v name="$2" '$2 == name || $2 == "*" name { print $1 }' "$tmp/SHA256SUMS")
	[ -n "$want" ] || fail "$1/SHA256SUMS has no checksum of $2; nothing was installed"
	got=$(checksum "$tmp/$2")
	[ "$got" = "$want" ] || fail "$1/$2 is corrupt: its SHA-256 checksum is $got, SHA256SUMS has $want;" \
		"nothing was installed"
}

# unpack ARCHIVE MEMBERS: extracts members of a verified archive to $tmp/files.
unpack() {
	local archive=$1
	shift
	tar -xzf "$tmp/$archive" -C "$tmp/files" --strip-components=1 --no-same-owner "${@/#/cri-dockerd/}" ||
		fail "unpack $archive: see the message above; nothing was installed"
}

# stage PREFIX: generates the remaining files, and writes lines "mode source destination" to $tmp/list.
stage() {
	local files=$tmp/files program=$tmp/files/cri-dockerd shell name
	chmod 755 "$program"
	"$program" man | gzip -9n >"$files/cri-dockerd.8.gz" || fail "run $program man: failed on this machine"
	for shell in bash zsh fish; do
		"$program" completion "$shell" >"$files/completion.$shell" || fail "run $program completion $shell: failed"
	done
	for unit in $units; do sed -i "s#/usr/bin/cri-dockerd#$1/bin/cri-dockerd#g" "$files/$unit"; done

	{
		echo "755 cri-dockerd $1/bin/cri-dockerd"
		for name in $shim; do
			[ ! -f "$files/$name" ] || echo "755 $name $1/bin/$name"
		done
		for unit in $units; do echo "644 $unit $UNITDIR/$unit"; done
		echo "644 default $config"
		echo "644 cri-dockerd.8.gz $1/share/man/man8/cri-dockerd.8.gz"
		echo "644 completion.bash $1/share/bash-completion/completions/cri-dockerd"
		echo "644 completion.zsh $1/share/zsh/site-functions/_cri-dockerd"
		echo "644 completion.fish $1/share/fish/vendor_completions.d/cri-dockerd.fish"
	} >"$tmp/list"
}

# install_files installs the files of $tmp/list. The manifest is written first: after a failure, --uninstall removes the
# files that were installed. Its lines are "file PATH", "config PATH CHECKSUM" and "directory PATH", without DESTDIR.
install_files() {
	local mode source file sum
	upgrade=''
	touch "$tmp/old"
	if [ -f "$DESTDIR$manifest" ]; then
		upgrade=1
		cp "$DESTDIR$manifest" "$tmp/old"
	fi

	# A changed configuration stays, and one of another origin is not part of the installation.
	sum=$(awk '$1 == "config" { print $3 }' "$tmp/old")
	if [ -e "$DESTDIR$config" ] && [ "$(checksum "$DESTDIR$config")" != "$sum" ]; then
		sed -i "\\# $config\$#d" "$tmp/list"
	else
		sum=$(checksum "$tmp/files/default")
	fi

	{
		grep '^directory ' "$tmp/old" || true
		[ -z "$sum" ] || echo "config $config $sum"
		while read -r mode source file; do
			missing_directories "${file%/*}"
			[ "$file" = "$config" ] || echo "file $file"
		done <"$tmp/list"
		missing_directories "${manifest%/*}"
	} | awk '!seen[$0]++' >"$tmp/manifest"

	place 644 "$tmp/manifest" "$manifest"
	while read -r mode source file; do place "$mode" "$tmp/files/$source" "$file"; done <"$tmp/list"
	grep '^file ' "$tmp/old" | grep -vxFf "$tmp/manifest" | while read -r mode file; do
		rm -f "$DESTDIR$file" # of the former release only
	done || true
}

checksum() { sha256sum "$1" | cut -d' ' -f1; }

# missing_directories DIR: prints manifest lines of a directory and its parents, if they do not exist.
missing_directories() {
	local dir=$1
	while [ -n "$dir" ] && [ ! -d "$DESTDIR$dir" ]; do
		echo "directory $dir"
		dir=${dir%/*}
	done
}

# place MODE SOURCE FILE: installs a file atomically. A running program keeps its old file.
place() {
	mkdir -p "$DESTDIR${3%/*}" && install -m "$1" "$2" "$DESTDIR$3.new" && mv -f "$DESTDIR$3.new" "$DESTDIR$3" || {
		rm -f "$DESTDIR$3.new"
		fail "install $DESTDIR$3: see the message above"
	}
}

# print_next_steps PREFIX: prints the commands to start the installed units.
print_next_steps() {
	echo "installed $("$tmp/files/cri-dockerd" --version) in $DESTDIR$1"
	[ -z "$DESTDIR" ] || return 0
	local dir
	for dir in /etc/systemd/system /usr/local/lib/systemd/system; do
		[ "$dir" != "$UNITDIR" ] || break
		[ ! -e "$dir/cri-docker.service" ] ||
			echo "warning: $dir/cri-docker.service takes precedence over $UNITDIR; remove it" >&2
	done
	echo "to start it, run as root:"
	echo "  systemctl daemon-reload"
	if [ -n "$upgrade" ]; then
		echo "  systemctl try-restart cri-docker.service"
	else
		echo "  systemctl enable --now $units"
	fi
}

# uninstall_files removes the files and directories of the manifest. A changed configuration stays.
uninstall_files() {
	local kind file sum unit directories
	[ -f "$DESTDIR$manifest" ] ||
		fail "no installation below $DESTDIR${prefix:-/}: $DESTDIR$manifest does not exist"
	if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
		for unit in $units; do
			[ "$(systemctl show --value -p FragmentPath "$unit")" = "$UNITDIR/$unit" ] || continue
			if systemctl --quiet is-enabled "$unit" || systemctl --quiet is-active "$unit"; then
				fail "$unit is enabled or running; drain the node, and run: systemctl disable --now $units"
			fi
		done
	fi

	while read -r kind file sum; do
		case $kind in
		file) rm -f "$DESTDIR$file" ;;
		config)
			if [ -e "$DESTDIR$file" ] && [ "$(checksum "$DESTDIR$file")" != "$sum" ]; then
				echo "kept $DESTDIR$file: it was changed"
			else
				rm -f "$DESTDIR$file"
			fi
			;;
		esac
	done <"$DESTDIR$manifest"

	# Children before parents. Directories with other files stay.
	directories=$(sed -n 's/^directory //p' "$DESTDIR$manifest" | LC_ALL=C sort -r)
	rm -f "$DESTDIR$manifest"
	for file in $directories; do
		[ ! -d "$DESTDIR$file" ] || rmdir --ignore-fail-on-non-empty "$DESTDIR$file"
	done
	echo "removed cri-dockerd from $DESTDIR${prefix:-/}"
}

main "$@"
