# Configures Docker: version $ENGINE, cgroup driver $DRIVER. Without a change nothing restarts.
. ./lib.sh

want="$ENGINE $DRIVER"
state=/var/lib/cri-vm-engine
if [ "$(cat $state 2>/dev/null)" != "$want" ] || ! docker info > /dev/null 2>&1; then
	rm -f $state
	docker ps -aq | xargs -r docker rm -f > /dev/null || true
	cat > /etc/docker/daemon.json <<END
{"exec-opts": ["native.cgroupdriver=$DRIVER"], "live-restore": true, "data-root": "/var/lib/docker-$ENGINE"}
END
	for unit in docker containerd; do rm -f /etc/systemd/system/$unit.service.d/vm.conf; done
	if [ "$ENGINE" = 29 ]; then bash docker29.sh /var/lib/containerd-29; fi
	systemctl daemon-reload
	systemctl stop docker.socket docker.service
	systemctl restart containerd.service
	systemctl start docker.socket docker.service
fi

docker image inspect busybox:latest > /dev/null 2>&1 || $root/pods/pods image
docker version -f '{{.Server.Version}}' | grep -q "^$ENGINE\." || fail "engine: $(docker version)"
driver=$(docker info -f '{{.CgroupDriver}} {{.CgroupVersion}}')
[ "$driver" = "$DRIVER 2" ] || fail "cgroup driver and version: $driver"
await 60 cri-dockerd check --timeout 60s
[ "$ENGINE" != 29 ] || await 600 shim_used
echo "$want" > $state
docker info -f '{{.ServerVersion}} {{.CgroupDriver}} cgroup v{{.CgroupVersion}} {{.SecurityOptions}} kernel {{.KernelVersion}}'
