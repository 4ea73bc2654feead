# Upgrades Docker from 20.10 to 29 under running pods. The argument is the value of live-restore: true or false.
. ./lib.sh

pods() { $root/pods/pods "$1" /var/lib/cri-vm-pods.json; }
stop_docker() { systemctl stop docker.socket docker.service && systemctl stop containerd.service; }
data=/var/lib/docker-upgrade

# The next step configures the engine again, with the containerd of 20.10.
clean_up() {
	docker ps -aq | xargs -r docker rm -f > /dev/null || true
	stop_docker
	rm -rf $data /var/lib/containerd /var/lib/cri-vm-engine
}
trap clean_up EXIT

stop_docker
rm -rf $data
jq ". + {\"live-restore\": $1, \"data-root\": \"$data\"}" /etc/docker/daemon.json > /tmp/daemon.json
cp /tmp/daemon.json /etc/docker/daemon.json
systemctl start containerd.service docker.socket docker.service
$root/pods/pods image
await 60 cri-dockerd check --timeout 60s
pods start

echo "=== upgrade"
bash docker29.sh /var/lib/containerd
systemctl daemon-reload
systemctl stop docker.service
systemctl restart containerd.service
systemctl start docker.service
docker version -f '{{.Server.Version}}'
await 600 cri-dockerd check --timeout 60s
if [ "$1" = true ]; then
	pods running
else
	pods ended
fi
pods again
pods remove
