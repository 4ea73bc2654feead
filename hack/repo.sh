#!/usr/bin/env bash
# Creates an apt and an rpm repository with the packages of make package. Environment:
#   GPG_KEY   key that signs both, as fingerprint or address of a secret key of gpg; "none" leaves them unsigned
#   PACKAGES  directory of the packages (dist)
#   OUT       output directory (dist/repo); a former one is replaced
# Layout:
#   cri-dockerd.asc                public key
#   deb/dists/stable, deb/pool     apt: InRelease and Release.gpg sign the checksums of all packages
#   rpm/x86_64, rpm/aarch64        rpm: signed packages, repodata/repomd.xml with repomd.xml.asc
# Needs apt-ftparchive (apt-utils), createrepo_c (createrepo-c), rpmsign (rpm) and gpg.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=${PACKAGES:-dist} out=${OUT:-dist/repo} key=${GPG_KEY:-}

fail() {
	echo "hack/repo.sh: $*" >&2
	exit 1
}

[ -n "$key" ] || fail "set GPG_KEY to a key of gpg --list-secret-keys, or to none for repositories without signatures"
for tool in apt-ftparchive createrepo_c rpmsign gpg; do
	command -v $tool >/dev/null || fail "$tool is missing; run: apt-get install apt-utils createrepo-c rpm gnupg"
done
for format in deb rpm; do
	compgen -G "$packages/*.$format" >/dev/null || fail "no $format in $packages; run make package first"
done
if [ "$key" = none ]; then
	echo "hack/repo.sh: warning: GPG_KEY=none, so the repositories have no signatures" >&2
else
	# A key may have several names. Its fingerprint is unique.
	fingerprint=$(gpg --batch --with-colons --list-secret-keys "$key" 2>/dev/null |
		awk -F: '$1 == "fpr" { print $10; exit }') || true
	[ -n "$fingerprint" ] || fail "GPG_KEY=$key: gpg has no such secret key"
	key=$fingerprint
fi

[ ! -e "$out" ] || [ -d "$out/deb/dists" ] || fail "$out exists and is not a repository of this script; remove it"
mkdir -p "$(dirname "$out")"
repo=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$repo"' EXIT
chmod 755 "$repo"

sign() { gpg --batch --yes --local-user "$key" --digest-algo SHA512 "$@"; }

# rpmsign looks for gpg2 on some systems, and asks gpg for a terminal.
sign_packages() {
	rpmsign --define "__gpg $(command -v gpg)" --define "_gpg_name $key" --define '_gpg_digest_algo sha512' \
		--define '_gpg_sign_cmd_extra_args --batch' --addsign "$@" 2>&1 >/dev/null </dev/null |
		{ grep -v 'Could not set GPG_TTY' >&2 || true; }
}

# apt: packages in the pool, an index for each architecture, and Release with the checksums of the indexes.
pool=pool/main/c/cri-dockerd
mkdir -p "$repo/deb/$pool" "$repo/deb/dists/stable"
cp "$packages"/*.deb "$repo/deb/$pool"
architectures=$(for deb in "$repo/deb/$pool"/*.deb; do dpkg-deb -f "$deb" Architecture; done | sort -u)
ftparchive() { apt-ftparchive -o APT::FTPArchive::MD5=false -o APT::FTPArchive::SHA1=false "$@"; }
for arch in $architectures; do
	index=$repo/deb/dists/stable/main/binary-$arch
	mkdir -p "$index"
	(cd "$repo/deb" && ftparchive --arch "$arch" packages pool) > "$index/Packages"
	gzip -9nk "$index/Packages"
done
options=()
for field in Origin=cri-dockerd Label=cri-dockerd Suite=stable Codename=stable Components=main \
	"Architectures=${architectures//$'\n'/ }"; do
	options+=(-o "APT::FTPArchive::Release::$field")
done
ftparchive "${options[@]}" release "$repo/deb/dists/stable" > "$repo/Release"
mv "$repo/Release" "$repo/deb/dists/stable/Release"
if [ "$key" != none ]; then
	sign --clearsign --output "$repo/deb/dists/stable/InRelease" "$repo/deb/dists/stable/Release"
	sign --armor --detach-sign --output "$repo/deb/dists/stable/Release.gpg" "$repo/deb/dists/stable/Release"
fi

# rpm: signed copies of the packages, and the metadata of each architecture.
for rpm in "$packages"/*.rpm; do
	arch=$(rpm -qp --qf '%{ARCH}' "$rpm" 2>/dev/null)
	install -D -m 644 "$rpm" "$repo/rpm/$arch/$(basename "$rpm")"
done
for dir in "$repo"/rpm/*; do
	[ "$key" = none ] || sign_packages "$dir"/*.rpm
	createrepo_c --quiet --no-database --checksum sha256 "$dir"
	[ "$key" = none ] || sign --armor --detach-sign --output "$dir/repodata/repomd.xml.asc" "$dir/repodata/repomd.xml"
done

[ "$key" = none ] || gpg --batch --armor --export "$key" > "$repo/cri-dockerd.asc"
rm -rf "$out"
mv "$repo" "$out"
echo "created $out/deb and $out/rpm${fingerprint:+, signed with $fingerprint}"
