# Unit tests on this kernel's control groups.
. ./lib.sh

for dir in "$root"/units/*; do
	cd "$dir"
	echo "=== ${dir##*/}"
	./test -test.v > out.log 2>&1 || { grep -E -A 20 '^\s*--- FAIL|panic:' out.log; fail "${dir##*/}"; }
	echo "passed: $(grep -cE '^--- PASS' out.log), skipped: $(grep -E '^\s*--- SKIP' out.log || echo none)"
done
