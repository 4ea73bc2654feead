# After the restart the pods have ended, run again, and can be removed.
. ./lib.sh

pods() { $root/pods/pods "$1" /var/lib/cri-vm-pods.json; }
await 600 cri-dockerd check --timeout 60s
pods ended
pods again
pods remove
findings=$(cri-dockerd check --timeout 60s -o json > /tmp/check.json; findings /tmp/check.json)
[ -z "$findings" ] || fail "$findings"
