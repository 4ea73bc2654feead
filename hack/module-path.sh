#!/usr/bin/env bash
# Changes the module path: hack/module-path.sh NEW/PATH. It edits all go.mod files, and the imports and package names in
# Go files. Names of the product, such as paths and labels, stay.
set -euo pipefail
cd "$(dirname "$0")/.."
new=${1:-}

if [ $# != 1 ] || [[ ! $new =~ ^[a-z0-9-]+(\.[a-z0-9-]+)+(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$ ]]; then
	echo "usage: hack/module-path.sh NEW/PATH, for example github.com/OWNER/cri-dockerd" >&2
	exit 2
fi
old=$(awk '$1 == "module" { print $2; exit }' go.mod)

find . -name go.mod -not -path './.git/*' | while read -r file; do
	path=$(awk '$1 == "module" { print $2; exit }' "$file")
	go mod edit -module="$new${path#"$old"}" "$file"
done

# Packages appear in imports, as arguments ("PATH/cmd/..."), in types ("(*PATH/internal/...") and as prefix ("PATH/").
pattern=${old//./\\.}
find cmd internal test hack -name '*.go' -exec grep -lF "$old/" {} + | while read -r file; do
	sed -i -E "s#([\"*])$pattern/((cmd|internal|test|hack)/|\"\$)#\1$new/\2#g" "$file"
	gofmt -w "$file"
done
echo "changed the module path from $old to $new; run: go build ./... && go vet ./..."
