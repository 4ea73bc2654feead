# Limits set by a kubelet with MemoryQoS, LimitedSwap, huge pages and the static CPU policy reach the kernel and stay: over
# reloads of systemd, restarts of the daemon, the kubelet's own updates, and a resize.
. ./lib.sh

# One CPU is reserved, one is pinned, and the others are for all other pods.
[ "$(nproc)" -ge 3 ] || fail "the node has $(nproc) CPUs, three are required"
sysctl -qw vm.nr_hugepages=16
[ "$(sysctl -n vm.nr_hugepages)" = 16 ] || fail "the node has no memory for 16 huge pages"
bash -eu ./kubelet-up.sh 'featureGates: {MemoryQoS: true}' 'memoryThrottlingFactor: 0.9' \
	'memoryReservationPolicy: TieredReservation' 'cpuManagerPolicy: static' 'reservedSystemCPUs: "0"'
trap 'kubectl delete pod --all --grace-period=0 --force > /dev/null 2>&1; systemctl stop vm-kubelet vm-apiserver vm-etcd' EXIT

# pod NAME RESOURCES [VOLUME COMMAND]: the volume is mounted at /volume
pod() {
	local volume=${3:-} check=${4:-true}
	[ -n "$volume" ] || volume='{}'
	kubectl apply -f - <<END
apiVersion: v1
kind: Pod
metadata: {name: $1}
spec:
  nodeName: vm
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  enableServiceLinks: false
  containers:
  - name: main
    image: busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "$check && sleep 1000000"]
    resources: $2
    volumeMounts: [{name: volume, mountPath: /volume}]
  volumes: [{name: volume, emptyDir: $volume}]
END
}
pod pinned '{requests: {cpu: 1, memory: 64Mi}, limits: {cpu: 1, memory: 64Mi}}'
pod burst '{requests: {cpu: 100m, memory: 32Mi}, limits: {cpu: 300m, memory: 128Mi}}'
pod huge '{requests: {memory: 32Mi}, limits: {memory: 32Mi, hugepages-2Mi: 8Mi}}' '{medium: HugePages}' \
	'grep -q /volume.hugetlbfs.*pagesize=2M /proc/mounts'
# A container without swap: the kubelet resizes no other in place.
pod grow '{requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 300m, memory: 64Mi}}'
await 300 kubectl wait --for=condition=Ready pod/pinned pod/burst pod/huge pod/grow --timeout=10s

# expect POD FILE VALUE
expect() {
	local got
	for _ in $(seq 60); do
		got=$(value "$1" "$2")
		[ "$got" != "$3" ] || return 0
		sleep 0.5
	done
	echo "WRONG: $1: $2 is $got, want $3"
	wrong=1
}
# cpus POD: prints the CPUs of a container, each on a line
cpus() {
	value "$1" cpuset.cpus.effective | tr , '\n' | while IFS=- read -r first last; do
		seq "$first" "${last:-$first}"
	done
}
# expect_pinned: the pinned container has one CPU, not the reserved one, and all others are left for other pods
expect_pinned() {
	local all every
	every=$(seq -s ' ' 0 $(($(nproc) - 1)))
	for _ in $(seq 60); do
		all=$({ cpus pinned; cpus burst; } | sort -n | xargs)
		if [ "$(cpus pinned | wc -l)" = 1 ] && [ "$(cpus pinned)" != 0 ] && [ "$all" = "$every" ]; then
			return
		fi
		sleep 0.5
	done
	echo "WRONG: pinned has the CPUs $(cpus pinned | xargs), burst has $(cpus burst | xargs)"
	wrong=1
}
# page BYTES: rounds down to pages
page() { echo $(($1 / 4096 * 4096)); }
total=$(awk '/^MemTotal:/ { printf "%.0f", $2 * 1024 }' /proc/meminfo)
swap=$(awk '/^SwapTotal:/ { printf "%.0f", $2 * 1024 }' /proc/meminfo)
mib=1048576

expect_all() {
	expect pinned memory.max $((64 * mib))
	expect pinned memory.swap.max 0
	expect pinned memory.oom.group 1
	expect pinned memory.min $((64 * mib)) # MemoryQoS
	expect burst memory.low $((32 * mib))
	expect huge hugetlb.2MB.max $((8 * mib))
	expect huge memory.oom.group 1
	expect burst memory.max $((128 * mib))
	# MemoryQoS: the request and 90 % of the rest
	expect burst memory.high "$(page $((32 * mib + 96 * mib * 9 / 10)))"
	expect burst memory.oom.group 1
	# LimitedSwap: the share of the swap is the request's share of the memory
	expect burst memory.swap.max "$(page $((32 * mib * (swap / 4096) / (total / 4096))))"
	expect burst cpu.max "30000 100000"
	expect_pinned
}
wrong=
expect_all
for pod in pinned burst huge; do
	values $pod | tee /tmp/$pod.values
done

# same EVENT: the values are as before
same() {
	for pod in pinned burst huge; do
		if ! values $pod | diff /tmp/$pod.values - > /tmp/values.diff; then
			echo "WRONG: $pod after $1:"
			cat /tmp/values.diff
			wrong=1
		fi
	done
}
systemctl daemon-reload
sleep 5
same "systemctl daemon-reload"
systemctl daemon-reexec
sleep 5
same "systemctl daemon-reexec"
systemctl restart cri-docker
ready() { cri-dockerd check --timeout 60s | grep -q '^ok *runtime-ready'; }
await 120 ready
sleep 25 # two reconciliations of the CPU manager
same "a restart of the daemon"

echo "=== resize"
id=$(kubectl get pod grow -o jsonpath='{.status.containerStatuses[0].containerID}')
kubectl patch pod grow --subresource resize -p '{"spec": {"containers": [{"name": "main", "resources":
	{"requests": {"cpu": "200m", "memory": "96Mi"}, "limits": {"cpu": "500m", "memory": "96Mi"}}}]}}'
expect grow cpu.max "50000 100000"
expect grow memory.max $((96 * mib))
expect grow memory.swap.max 0
expect grow memory.low $((96 * mib))
expect grow memory.oom.group 1
values grow
resized() {
	[ "$(kubectl get pod grow -o jsonpath='{.status.containerStatuses[0].resources.limits.cpu}')" = 500m ] &&
		[ "$(kubectl get pod grow -o jsonpath='{.status.containerStatuses[0].resources.limits.memory}')" = 96Mi ]
}
await 60 resized
[ "$(kubectl get pod grow -o jsonpath='{.status.containerStatuses[0].containerID}')" = "$id" ] ||
	fail "the resize restarted the container"
values pinned | diff /tmp/pinned.values - || fail "the resize changed another pod"
[ -z "$wrong" ] || fail "wrong values, see above"
