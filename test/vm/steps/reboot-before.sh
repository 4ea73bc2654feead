# Pods run when the node restarts.
. ./lib.sh

$root/pods/pods start /var/lib/cri-vm-pods.json
