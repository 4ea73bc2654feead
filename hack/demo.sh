#!/usr/bin/env bash
# The main job in one go: an engine (a private one if none answers), the daemon with kubenet on a free range, and one pod through it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "the demo starts engines and networks: run it as root" >&2; exit 1; }
docker=/var/run/docker.sock
started=

cleanup() {
	status=$?
	[ -n "${daemon:-}" ] && kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null
	if [ $status != 0 ]; then tail -n 20 "$dir"/*.log 2>/dev/null || true; fi
	pkill -f "log-driver --run-directory=$dir/run" || true # it outlives the daemon on purpose
	if [ -n "$started" ]; then kill "$started" 2>/dev/null; wait "$started" 2>/dev/null || true; fi
	ip link del cbr0 2>/dev/null || true
	rm -rf "$dir" 2>/dev/null || true
	exit $status
}

# Everything that the demo starts by itself lives in mount and network namespaces of its own: the host's Docker, its bridge and its
# firewall rules stay as they are. With an engine of the host's, the pod must be where that engine's containers are.
if [ "${1:-}" != inside ]; then
	if docker -H "unix://$docker" info >/dev/null 2>&1; then
		exec "$0" inside host
	fi
	exec unshare -m -n --propagation private "$0" inside private
fi
dir=$(mktemp -d /tmp/cri-dockerd-demo.XXXXXX)
trap cleanup EXIT
trap 'exit 1' INT TERM

if [ "$2" = private ]; then
	echo "no Docker answers on $docker: starting a private one"
	mount -t tmpfs -o mode=755 tmpfs /run
	mkdir -p /run/lock /var/lib/cni
	mount -t tmpfs tmpfs /var/lib/cni
	ip link set lo up
	docker=$dir/docker.sock
	dockerd -H "unix://$docker" --data-root "$dir/data" --exec-root /run/docker --pidfile /run/docker.pid --bridge=none >"$dir/docker.log" 2>&1 &
	started=$!
	for _ in $(seq 300); do docker -H "unix://$docker" info >/dev/null 2>&1 && break; sleep 0.1; done
fi

for n in $(seq 88 120) ; do # a range that no route of this machine covers
	[ -z "$(ip -4 route show to match "10.$n.0.1" | grep -v '^default')" ] && cidr=10.$n.0.0/24 && break
done
socket=$dir/cri-dockerd.sock
bin/cri-dockerd --container-runtime-endpoint "unix://$socket" --docker-endpoint "unix://$docker" --network-plugin kubenet --pod-cidr "$cidr" \
	--cri-dockerd-root-directory "$dir/lib" --run-directory "$dir/run" --cni-cache-dir "$dir/cni" >"$dir/cri-dockerd.log" 2>&1 &
daemon=$!
for _ in $(seq 100); do [ -S "$socket" ] && grep -q 'container logs' "$dir/cri-dockerd.log" && break; sleep 0.1; done
bin/cri-dockerd check --pod --container-runtime-endpoint "unix://$socket" --docker-endpoint "unix://$docker"
cat <<EOF

To run pods with a kubelet, start the daemon on the usual socket and point the kubelet at it:

  bin/cri-dockerd --network-plugin=cni &
  kubelet --config=kubelet.yaml        # with   containerRuntimeEndpoint: unix:///var/run/cri-dockerd.sock
  kubeadm init --cri-socket unix:///var/run/cri-dockerd.sock
EOF
