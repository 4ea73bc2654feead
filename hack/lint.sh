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

. hack/go-tool.sh
install golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint "$version"
install deadcode golang.org/x/tools/cmd/deadcode "$tools"
"$cache/golangci-lint-$version" run ./...

# Functions that nothing calls, in the daemon and in the tests.
dead=$("$cache/deadcode-$tools" ./cmd/... && "$cache/deadcode-$tools" -test ./...)
[ -z "$dead" ] || { printf 'dead code:\n%s\n' "$dead" >&2; exit 1; }
