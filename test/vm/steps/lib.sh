# Functions for the steps. A step sources this file.
socket=/run/cri-dockerd.sock
root=/opt/cri-vm

fail() {
	echo "FAIL: $*" >&2
	exit 1
}

# await SECONDS COMMAND...: repeats the command until it succeeds
await() {
	local end=$((SECONDS + $1))
	shift
	until "$@" > /tmp/await.out 2>&1; do
		[ $SECONDS -lt $end ] || fail "timed out waiting for: $*: $(tail -n 20 /tmp/await.out)"
		sleep 0.5
	done
}

# findings FILE: prints the findings of a report of check that are neither ok nor skipped. The clock of a machine without
# a network is not synchronized.
findings() {
	jq -r '.findings[] | select(.status != "ok" and .status != "skip" and .id != "clock") | "\(.status) \(.id): \(.detail)"' "$1"
}

# shim_used: reports whether new pods run under the containerd shim, whose trial takes minutes on a slow machine.
shim_used() {
	cri-dockerd check --timeout 60s -o json > /tmp/check.json || true
	jq -e '.findings[] | select(.id == "containerd-shim") | .status == "ok"' /tmp/check.json
}

kubectl() { $root/kubernetes/kubectl --kubeconfig /var/lib/cri-vm-kubernetes/kubeconfig "$@"; }

# group POD: prints the directory of the control group of a pod's container main
group() {
	local pid
	pid=$(docker inspect -f '{{.State.Pid}}' "$(docker ps -q --filter "name=^k8s_main_$1_")")
	echo "/sys/fs/cgroup$(cut -d: -f3 "/proc/$pid/cgroup")"
}

# values POD: prints the limits of a pod's container main
values() {
	local dir
	dir=$(group "$1")
	for f in memory.max memory.high memory.min memory.low memory.swap.max memory.oom.group cpu.max cpu.weight \
		cpuset.cpus.effective pids.max hugetlb.2MB.max; do
		echo "$f $(cat "$dir/$f")"
	done
}

# value POD FILE
value() { cat "$(group "$1")/$2"; }
