# The conformance suite on the daemon's socket. Arguments are further flags of the suite.
. ./lib.sh

cd "$root/conformance"
./test -test.v -test.timeout 110m -test.parallel 2 -endpoint unix://$socket "$@" > /tmp/conformance.log 2>&1 || failed=1
grep -E '^\s*--- FAIL' /tmp/conformance.log || true
count() { grep -cE "^--- $1" /tmp/conformance.log || true; }
echo "passed: $(count PASS), failed: $(count FAIL), skipped: $(count SKIP)"
[ -z "${failed:-}" ] || { cat /tmp/conformance.log; fail "the suite failed"; }
[ "$(count PASS)" -gt 0 ] || fail "no test ran"
