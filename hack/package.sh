#!/usr/bin/env bash
# Builds deb, rpm and tgz with their SBOMs, the archive of the systemd units, install.sh and SHA256SUMS. The same commit
# and Go release give the same bytes. Environment:
#   VERSION     version of the packages
#   MAINTAINER  "name <address>" in the metadata of deb and rpm
#   ARCHES      architectures ("amd64 arm64")
#   OUT         output directory (dist)
# Needs Go, make, tar and gzip. nfpm and cyclonedx-gomod come from hack/tools/go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
export VERSION=${VERSION:?set VERSION, for example VERSION=1.0.0}
export MAINTAINER=${MAINTAINER:-}
if [[ ! $MAINTAINER =~ ^[^\<\>]+' <'[^\<\>@\ ]+@[^\<\>@\ ]+'>'$ ]]; then
	echo "hack/package.sh: MAINTAINER is \"$MAINTAINER\"; set MAINTAINER='name <address>', the maintainer in the metadata" \
		"of deb and rpm; it has no default" >&2
	exit 1
fi
commit_time=$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$commit_time} LC_ALL=C TZ=UTC
out=$(mkdir -p "${OUT:-dist}" && cd "${OUT:-dist}" && pwd)
stages=$(mktemp -d)
trap 'rm -rf "$stages"' EXIT

tool() { GOFLAGS="-trimpath -buildvcs=false" GOARCH= go tool -modfile=hack/tools/go.mod "$@"; }
stamp() { find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; }
archive() { # DIRECTORY MEMBERS: a tgz of members of a directory, below cri-dockerd/
	local dir=$1
	shift
	tar -C "$stages" --transform "s#^$dir#cri-dockerd#" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--no-recursion -cf - "$dir" "${@/#/$dir/}" | gzip -9n
}

# The native program prints the files common to the packages of all architectures.
make -s build BIN="$stages/native" VERSION="$VERSION"
mkdir "$stages/common"
for shell in bash zsh fish; do "$stages/native" completion $shell > "$stages/common/completion.$shell"; done
"$stages/native" man | gzip -9n > "$stages/common/cri-dockerd.8.gz"

# Licenses of the linked modules.
shim="containerd-shim-cri-dockerd-v1 containerd-shim-cri-dockerd-server"
(cd "$stages" && go version -m native $shim) | awk '$1 == "dep" { print $2 "@" $3 }' | sort -u | xargs go mod download -json |
	sed -n 's/^\t"Dir": "\(.*\)",$/\1/p' | sort | while read -r dir; do
	for f in "$dir"/LICEN[SC]E* "$dir"/COPYING* "$dir"/NOTICE*; do
		[ -f "$f" ] && printf '\n==== %s\n\n' "${f#"$(go env GOMODCACHE)/"}" && cat "$f"
	done || true
done | gzip -9n > "$stages/common/licenses.gz"

cat > "$stages/common/changelog.yaml" <<END
- semver: $VERSION
  date: $(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)
  packager: '${MAINTAINER//\'/\'\'}'
  deb: {urgency: medium, distributions: [unstable]}
  changes:
    - note: Release $VERSION. For the changes, see CHANGELOG.md of the source.
END

# Files for install.sh. The tgz with the program has no other files: installers of the older shim unpack it into a
# directory of programs.
mkdir "$stages/units"
cp deploy/systemd/* deploy/package/default "$stages/units"
stamp "$stages/units"
archive units $(cd "$stages/units" && ls) > "$out/cri-dockerd-$VERSION.units.tgz"
install -m 755 install.sh "$out/install.sh"

for ARCH in ${ARCHES:-amd64 arm64}; do
	export ARCH
	stage=$stages/$ARCH
	cp -r "$stages/common" "$stage"
	sed "s#\${STAGE}#$stage#" deploy/package/nfpm.yaml > "$stage/nfpm.yaml"
	GOARCH=$ARCH make -s build BIN="$stage/cri-dockerd" VERSION="$VERSION"
	tool cyclonedx-gomod bin -json -noserial -notimestamp -std -version "v$VERSION" \
		-output "$stage/sbom.cdx.json" "$stage/cri-dockerd" 2>/dev/null
	tool cyclonedx-gomod bin -json -noserial -notimestamp -std -version "v$VERSION" \
		-output "$stage/sbom-shim.cdx.json" "$stage/containerd-shim-cri-dockerd-server" 2>/dev/null
	stamp "$stage"
	for format in deb rpm; do
		tool nfpm package --config "$stage/nfpm.yaml" --packager $format --target "$out" > "$stages/output" ||
			{ cat "$stages/output" >&2; exit 1; }
	done
	archive "$ARCH" cri-dockerd > "$out/cri-dockerd-$VERSION.$ARCH.tgz"
	archive "$ARCH" $shim > "$out/cri-dockerd-$VERSION.$ARCH.shim.tgz"
	cp "$stage/sbom.cdx.json" "$out/cri-dockerd-$VERSION.$ARCH.sbom.cdx.json"
done
cd "$out"
find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%P\n' | sort | xargs sha256sum > SHA256SUMS
