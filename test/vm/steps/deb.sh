# Installs the deb with apt and checks that the units run.
. ./lib.sh

mkdir -p /etc/docker /etc/cni/net.d
cat > /etc/cni/net.d/10-vm.conflist <<'END'
{"cniVersion": "1.0.0", "name": "vm", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
END
printf 'net.ipv4.ip_forward = 1\n' > /etc/sysctl.d/99-kubernetes.conf
sysctl -q --system

apt-get install -y --allow-downgrades --reinstall "$root"/deb/*.deb
dpkg-query -W cri-dockerd
for unit in cri-docker.socket cri-docker.service cri-docker-log.socket cri-docker-log.service; do
	systemctl is-active "$unit" || fail "$unit is not active after the installation"
	systemctl is-enabled "$unit" || fail "$unit is not enabled after the installation"
done
[ "$(stat -c '%a %U:%G' $socket)" = "660 root:docker" ] || fail "socket: $(stat -c '%a %U:%G' $socket)"
cri-dockerd --version
