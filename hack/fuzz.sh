#!/usr/bin/env bash
# Fuzzes what reads foreign data: requests, labels, engine answers, events, the log-driver's protocol and frames, CNI
# results, checkpoints. Each target gets its number of inputs, some ten seconds' worth, or runs for the given time (30m).
# The corpora lie in testdata/fuzz.
#
# CI goes by number: before Go 1.27 the end of a time may fail with "context deadline exceeded" and without an input
# (go.dev/issue/75804).
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:-}
while read -r target package inputs; do
	go test -run '^$' -fuzz "^$target\$" -fuzztime "${each:-${inputs}x}" -fuzzminimizetime 1x "./internal/$package"
done <<'TARGETS'
FuzzTranslate translate 80000
FuzzRead translate 60000
FuzzEngineResponses engine 3000
FuzzRequests logs/driver 5000
FuzzCNIResult podnet 50000
FuzzCheckpoint checkpoint 5000
FuzzParse shim/annotation 50000
TARGETS
