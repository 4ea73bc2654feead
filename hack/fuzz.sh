#!/usr/bin/env bash
# Fuzzes what reads foreign data, each target for the given time (10s): requests, labels, engine answers, events, the log-driver's protocol
# and frames, CNI results, checkpoints. The corpora lie in testdata/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:-10s}
while read -r target package; do
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$each" -fuzzminimizetime 1x "./internal/$package"
done <<'TARGETS'
FuzzTranslate spec
FuzzRead spec
FuzzEngineAnswers engine
FuzzRequests logs/driver
FuzzCNIResult podnet
FuzzCheckpoint checkpoint
TARGETS
