# Process 1 of an engine's namespaces: sh setup.sh DIR HELPER [PROGRAMS]. Gives the node its own directories and a network with a default route.
set -e
dir=$1
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock
# The host's /etc and /var/lib are copy-on-write: no file or mount point of the node remains on the host. Mounts in them
# stay visible, such as the resolv.conf of a container. The upper directories are on a tmpfs, because an overlay of the
# host cannot be one.
mkdir "$dir/upper" "$dir/lower"
mount -t tmpfs -o mode=755 tmpfs "$dir/upper"
for d in /etc /var/lib; do
	u=$dir/upper/${d##*/}
	mkdir "$u" "$u.work"
	chmod 755 "$u"
	mount --rbind "$d" "$dir/lower"
	mount -t overlay -o "lowerdir=$d,upperdir=$u,workdir=$u.work" overlay "$d"
	while read -r _ _ _ _ m _; do
		case $m in "$dir"/lower/*) mount --bind "$m" "$d${m#"$dir"/lower}" ;; esac
	done < /proc/self/mountinfo
	umount -l "$dir/lower"
done
umount -l "$dir/upper"
rmdir "$dir/upper" "$dir/lower"
# These directories are empty. The test sees their files in $dir/root. HOME is $dir/root/root.
mkdir -p "$dir/root/var/log/pods" "$dir/root/var/log/containers" "$dir/root/root/.docker"
for d in /var/log /var/lib/cni /var/lib/dockershim /var/lib/kubelet /etc/cni /etc/docker; do
	mkdir -p "$d" "$dir/root$d"
	mount --bind "$dir/root$d" "$d"
done
# On cgroup v1, mount the host's hierarchies and those that hosts often leave unmounted: hugetlb, and any other that the systemd of a test node may
# mount. containerd misses the out-of-memory events of containers with a cgroup in an unmounted hierarchy.
cg=/sys/fs/cgroup
if [ -d $cg/memory ]; then
	mkdir "$dir/cgroup"
	mount --rbind $cg "$dir/cgroup"
	mount -t tmpfs -o mode=755 tmpfs $cg
	for h in "$dir"/cgroup/*; do
		if [ -L "$h" ]; then cp -a "$h" $cg/; else mkdir "$cg/${h##*/}" && mount --bind "$h" "$cg/${h##*/}"; fi
	done
	umount -l "$dir/cgroup"
	rmdir "$dir/cgroup"
	while read -r h _ _ enabled; do
		if [ "$enabled" = 1 ] && [ ! -e "$cg/$h" ]; then
			mkdir "$cg/$h"
			mount -t cgroup -o "$h" cgroup "$cg/$h" 2>/dev/null || rmdir "$cg/$h"
		fi
	done < /proc/cgroups
fi
# Users for an engine with --userns-remap=nobody:nogroup.
for f in subuid subgid; do echo nobody:200000:65536 > /etc/$f; done
# The C library of engines built for a newer one than the machine's. It serves all programs of the namespaces, because runc executes itself again
# without its environment.
lib=/usr/lib/$(uname -m)-linux-gnu
if [ -n "$3" ] && [ -d "$3/lib" ]; then mount -t overlay -o "ro,lowerdir=$3/lib:$lib" overlay "$lib"; fi
mount --make-rshared /
ip link set lo up
ip link add ext0 type bridge
ip link set ext0 up
ip addr add 192.0.2.1/24 dev ext0
ip route add default via 192.0.2.254 dev ext0
echo 1 > /proc/sys/net/ipv4/ip_forward
exec "$2" init
