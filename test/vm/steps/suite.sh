# Tests of the conformance suite that must pass here. Arguments: a pattern of their names, further flags. A skipped test
# fails the step.
. ./lib.sh

pattern=$1
shift
cd "$root/conformance"
./test -test.v -test.timeout 60m -test.run "$pattern" -endpoint unix://$socket "$@" | tee /tmp/suite.log
! grep -qE '^\s*--- FAIL' /tmp/suite.log || fail "failed tests: $(grep -E '^\s*--- FAIL' /tmp/suite.log)"
skipped=$(grep -E '^\s*--- SKIP' /tmp/suite.log || true)
[ -z "$skipped" ] || fail "skipped: $skipped"
grep -q '^--- PASS' /tmp/suite.log || fail "no test has passed: $pattern"
