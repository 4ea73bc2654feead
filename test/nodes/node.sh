# Creates a network or a node, each managed by a guard: sh node.sh network | sh node.sh guard DIR CGROUP NAME ADDRESS NETWORK-PID.
# Both print "ready PID" and run until the end of their standard input, even if the test process is killed.
set -e

# PID of this shell in the PID namespace of /proc.
own_pid() { read -r own _ < /proc/self/stat; }

# A switch for the nodes without an uplink. It rejects packets to other addresses immediately.
network() {
	ip link set lo up
	ip link add br0 type bridge
	ip addr add 10.89.0.1/24 dev br0
	ip link set br0 up
	echo 1 > /proc/sys/net/ipv4/ip_forward
	echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true
	ip route add unreachable default
	echo "ready $$"
	cat > /dev/null
}

# On cgroup v1, mounts the hierarchies not mounted by the host, because the node's systemd would mount them.
hierarchies() {
	[ ! -e /sys/fs/cgroup/cgroup.controllers ] || return 0
	while read -r h _ _ enabled; do
		if [ "$enabled" = 1 ] && [ ! -e "/sys/fs/cgroup/$h" ]; then
			mkdir -p "$dir/cgroup/$h"
			mount -t cgroup -o "$h" cgroup "$dir/cgroup/$h" 2>/dev/null || rmdir "$dir/cgroup/$h"
		fi
	done < /proc/cgroups
}

# Prints the control groups of the node, one in each hierarchy.
groups() {
	for h in /sys/fs/cgroup/*/cgroup.procs "$dir"/cgroup/*/cgroup.procs /sys/fs/cgroup/cgroup.procs; do
		if [ -e "$h" ]; then echo "${h%/cgroup.procs}/$cgroup"; fi
	done
}

# Starts the node.
start() {
	unshare -n sh "$0" outer "$@" < /dev/null &
	node=$!
}

# Ends the processes of the node and removes its control groups.
stop() {
	kill -9 $node 2>/dev/null || true # the kernel kills the other processes of the node
	wait || true
	for _ in $(seq 200); do
		remaining=
		for g in $(groups); do
			[ ! -d "$g" ] || find "$g" -depth -type d -exec rmdir {} \; 2>/dev/null || true
			[ ! -d "$g" ] || remaining=1
		done
		[ -n "$remaining" ] || return 0
		sleep 0.1
	done
	echo "control groups of the node in $dir remain" >&2
}

# Runs in its own mount namespace. Each line of standard input starts the node again, like a reset button.
guard() {
	hierarchies
	exec 3>&1 > /dev/null # only the node writes to the pipe for "ready"
	start "$@" >&3 3>&-
	while read -r _; do
		stop
		start "$@" >&3 3>&-
	done
	exec 3>&-
	stop
	umount "$dir"/cgroup/* 2>/dev/null || true
	for _ in $(seq 200); do
		if rm -rf "$dir" 2>/dev/null; then exit; fi
		sleep 0.1
	done
	echo "failed to stop the node in $dir" >&2
	exit 1
}

# Runs in its own network namespace. Connects to the switch and joins the control groups.
outer() {
	# The kernel removes the interface of the last boot asynchronously.
	nsenter --net=/proc/"$switch"/ns/net ip link del "v-$name" 2>/dev/null || true
	nsenter --net=/proc/"$switch"/ns/net ip link add "v-$name" type veth peer name eth0 netns $$
	nsenter --net=/proc/"$switch"/ns/net ip link set "v-$name" master br0 up
	ip link set lo up
	ip addr add "$address/24" dev eth0
	ip link set eth0 up
	ip route add default via 10.89.0.1
	for s in ipv4/ip_forward ipv6/conf/all/forwarding bridge/bridge-nf-call-iptables bridge/bridge-nf-call-ip6tables; do
		echo 1 > "/proc/sys/net/$s" 2>/dev/null || true # the module may be missing
	done
	for g in $(groups); do
		mkdir "$g"
		for f in cpuset.cpus cpuset.mems; do # required for processes on cgroup v1
			if [ -e "$g/$f" ] && [ ! -e "$g/cgroup.controllers" ]; then cat "${g%/*}/$f" > "$g/$f"; fi
		done
		echo $$ > "$g/cgroup.procs"
	done
	exec unshare -m -u -i -C -p --fork --kill-child=KILL --propagation private sh "$0" inner "$@"
}

# Prepares the root of a new node.
first_boot() {
	rm -f "$root/usr/sbin/policy-rc.d" # prevents packages from starting services in container images
	rm -f "$root/etc/resolv.conf"
	# A cri-dockerd of the host must not meet the package under test.
	rm -f "$root/etc/default/cri-docker" "$root/usr/bin/cri-dockerd" "$root"/lib/systemd/system/cri-docker*
	cp -a "$dir/files/." "$root/"
	touch "$dir/booted"
}

# Process 1 of the node. It executes systemd at the end.
inner() {
	own_pid
	root=$dir/root
	mount -t overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" overlay "$root"
	# These directories hide the state of the host, but receive the initial files of the test. Unlike the overlay, their
	# file system supports overlays.
	for d in /run /tmp /var/log /var/cache /var/lib/docker /var/lib/containerd /var/lib/kubelet /var/lib/etcd /var/lib/cni /var/lib/cri-dockerd \
		/var/lib/systemd /etc/docker /etc/cni /etc/kubernetes /etc/systemd/system /opt/cni /root; do
		mkdir -p "$root$d" "$dir/own$d"
		mount --bind "$dir/own$d" "$root$d"
	done
	if [ -e "$dir/booted" ]; then
		find "$root/run" "$root/tmp" -mindepth 1 -delete # empty at each boot, like a tmpfs
	else
		first_boot
	fi
	chmod 1777 "$root/tmp"
	while read -r from to; do
		if [ -d "$from" ]; then mkdir -p "$root$to"; else mkdir -p "$root${to%/*}" && touch "$root$to"; fi
		mount --bind "$from" "$root$to"
	done < "$dir/binds"
	mount -t proc proc "$root/proc"
	mount -t sysfs sysfs "$root/sys"
	mount --rbind /dev "$root/dev"
	mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
	if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
		mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
	else
		mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
		for h in /sys/fs/cgroup/* "$dir"/cgroup/*; do
			[ ! -L "$h" ] || { cp -a "$h" "$root/sys/fs/cgroup/"; continue; }
			[ -e "$h/cgroup.procs" ] || continue
			h=${h##*/} type=cgroup options=${h##*/}
			case $h in systemd) options=none,name=systemd ;; unified) type=cgroup2 options=rw ;; esac
			mkdir "$root/sys/fs/cgroup/$h"
			mount -t $type -o "$options" cgroup "$root/sys/fs/cgroup/$h"
		done
	fi
	mkdir -p "$root/oldroot" "$root/run/lock" "$root/lib/modules"
	cd "$root"
	pivot_root . oldroot
	umount -l /oldroot
	cd /
	rmdir /oldroot
	mount --make-rshared /
	hostname "$name"
	echo "ready $own"
	export container=test
	exec /lib/systemd/systemd --system --log-target=journal --show-status=false --unit=multi-user.target > /dev/null 2>&1
}

do=$1 dir=$2 cgroup=$3 name=$4 address=$5 switch=$6
shift
"$do" "$@"
