#!/usr/bin/env bash
# Runs golangci-lint with .golangci.yml, and deadcode. Both are built once, from the Go module proxy,
# and cached in ${XDG_CACHE_HOME:-~/.cache}/cri-dockerd-test.
set -euo pipefail
cd "$(dirname "$0")/.."
version=v2.15.0 tools=v0.52.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cri-dockerd-test/lint
export GOFLAGS=-buildvcs=false
mkdir -p "$cache"
exec 9>"$cache.lock"
flock 9

if [ ! -x "$cache/golangci-lint-$version" ]; then
	GOBIN=$cache go install -trimpath "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version"
	mv "$cache/golangci-lint" "$cache/golangci-lint-$version"
fi
"$cache/golangci-lint-$version" run ./...

# Functions that nothing calls, in the daemon and in the tests.
if [ ! -x "$cache/deadcode-$tools" ]; then
	GOBIN=$cache go install -trimpath "golang.org/x/tools/cmd/deadcode@$tools"
	mv "$cache/deadcode" "$cache/deadcode-$tools"
fi
dead=$("$cache/deadcode-$tools" ./cmd/... && "$cache/deadcode-$tools" -test ./...)
[ -z "$dead" ] || { printf 'dead code:\n%s\n' "$dead" >&2; exit 1; }
