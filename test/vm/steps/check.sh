# cri-dockerd check has no findings.
. ./lib.sh

time cri-dockerd check --timeout 60s
cri-dockerd check --timeout 60s -o json > /tmp/check.json
found=$(findings /tmp/check.json)
[ -z "$found" ] || fail "$found"
