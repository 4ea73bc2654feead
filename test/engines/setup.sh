# Runs as process 1 of an engine's namespaces: sh setup.sh DIR HELPER. Gives the node folders of its own and a network with a default route.
set -e
dir=$1
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock
for d in /var/lib/cni /var/lib/kubelet /var/log/pods /var/log/containers /etc/cni /etc/docker; do
	mkdir -p "$d" "$dir/root$d"
	mount --bind "$dir/root$d" "$d"
done
mount --make-rshared /
ip link set lo up
ip link add ext0 type bridge
ip link set ext0 up
ip addr add 192.0.2.1/24 dev ext0
ip route add default via 192.0.2.254 dev ext0
echo 1 > /proc/sys/net/ipv4/ip_forward
exec "$2" init
