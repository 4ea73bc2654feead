#!/usr/bin/env bash
# Builds deb, rpm and tgz with their SBOMs and SHA256SUMS. Environment: VERSION; ARCHES ("amd64 arm64"); OUT, the folder (dist). Whoever builds the
# same commit with the same Go gets the same bytes. Needs Go, make, tar and gzip; nfpm and cyclonedx-gomod come from hack/tools/go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
export VERSION=${VERSION:?} SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)} LC_ALL=C TZ=UTC
export MAINTAINER="cri-dockerd maintainers <maintainers@cri-dockerd.example.org>"
out=$(mkdir -p "${OUT:-dist}" && cd "${OUT:-dist}" && pwd)
stages=$(mktemp -d)
trap 'rm -rf "$stages"' EXIT
tool() { GOFLAGS="-trimpath -buildvcs=false" GOARCH= go tool -modfile=hack/tools/go.mod "$@"; }
stamp() { find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; }

# The native program prints what packages for all machines contain.
make -s build BIN="$stages/native" VERSION="$VERSION"
mkdir "$stages/common"
for shell in bash zsh fish; do "$stages/native" completion $shell > "$stages/common/completion.$shell"; done
"$stages/native" man | gzip -9n > "$stages/common/cri-dockerd.8.gz"
# The texts that the linked modules' licenses ask to pass on.
go version -m "$stages/native" | awk '$1 == "dep" { print $2 "@" $3 }' | xargs go mod download -json | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p' | sort | while read -r dir; do
	for f in "$dir"/LICEN[SC]E* "$dir"/COPYING* "$dir"/NOTICE*; do
		[ -f "$f" ] && printf '\n==== %s\n\n' "${f#"$(go env GOMODCACHE)/"}" && cat "$f"
	done || true
done | gzip -9n > "$stages/common/licenses.gz"
cat > "$stages/common/changelog.yaml" <<EOF
- semver: $VERSION
  date: $(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)
  packager: $MAINTAINER
  deb: {urgency: medium, distributions: [unstable]}
  changes:
    - note: Release $VERSION; CHANGELOG.md of the source says what has changed.
EOF

for ARCH in ${ARCHES:-amd64 arm64}; do
	export ARCH
	stage=$stages/$ARCH
	cp -r "$stages/common" "$stage"
	sed "s#\${STAGE}#$stage#" deploy/package/nfpm.yaml > "$stage/nfpm.yaml"
	GOARCH=$ARCH make -s build BIN="$stage/cri-dockerd" VERSION="$VERSION"
	tool cyclonedx-gomod bin -json -noserial -notimestamp -std -version "v$VERSION" -output "$stage/sbom.cdx.json" "$stage/cri-dockerd" 2>/dev/null
	stamp "$stage"
	for format in deb rpm; do
		tool nfpm package --config "$stage/nfpm.yaml" --packager $format --target "$out" > "$stages/said" || { cat "$stages/said" >&2; exit 1; }
	done
	tar -C "$stages" --transform "s#^$ARCH#cri-dockerd#" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --no-recursion -cf - "$ARCH" "$ARCH/cri-dockerd" |
		gzip -9n > "$out/cri-dockerd-$VERSION.$ARCH.tgz"
	cp "$stage/sbom.cdx.json" "$out/cri-dockerd-$VERSION.$ARCH.sbom.cdx.json"
done
cd "$out"
find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%P\n' | sort | xargs sha256sum > SHA256SUMS
