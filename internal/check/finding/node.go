package finding

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"cri-dockerd/internal/quantity"
	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/text"
)

func nodeRules() []rule {
	return []rule{
		{"privileges", "check has the required privileges", nil, checkPrivileges},
		{"file-owner", "only root can change configuration files", nil, checkFileOwner},
		{"clock", "system clock", nil, checkClock},
		{"directories", "directories of the daemon are writable", nil, checkDirectories},
		{"disk", "disk space and inodes", nil, checkDisk},
		{"docker-group", "group docker", nil, checkGroup},
	}
}

func checkPrivileges(f *Facts) result {
	switch {
	case !f.Root:
		return warn(shell.Command("sudo cri-dockerd check"), "not running as root: some checks are skipped")
	case f.Foreign != "":
		return warn(shell.Advice("run cri-dockerd check on the host, outside of containers"),
			"%s: check does not find processes in other namespaces", f.Foreign)
	}

	return ok("running as root")
}

// fix returns the line to make a file trusted.
func (u Untrusted) fix() shell.Line {
	if u.Shared {
		return shell.Advice("move {} to a directory writable only by root", u.File)
	}
	return shell.Command("chown root:root {} && chmod go-w {}", u.Path, u.Path)
}

// untrusted returns the record of a file in f.Untrusted.
func (f *Facts) untrusted(file string) (Untrusted, bool) {
	i := slices.IndexFunc(f.Untrusted, func(u Untrusted) bool { return u.File == file && file != "" })
	if i < 0 {
		return Untrusted{}, false
	}
	return f.Untrusted[i], true
}

// maxUntrusted is the maximum number of files in one finding.
const maxUntrusted = 5

// checkFileOwner reports untrusted files.
func checkFileOwner(f *Facts) result {
	var fix shell.Line
	var all []string
	seen := map[string]bool{}
	for _, r := range f.Untrusted[:min(len(f.Untrusted), maxUntrusted)] {
		all = append(all, text.Clean(r.File+": "+r.Reason, text.MaxName/2))
		if r.Shared || seen[r.Path] {
			continue
		}
		seen[r.Path] = true
		fix = fix.And(r.fix())
	}

	if more := len(f.Untrusted) - maxUntrusted; more > 0 {
		all = append(all, fmt.Sprintf("and %d more", more))
	}

	switch {
	case len(all) == 0:
		return ok("all files are trusted")
	case fix.IsZero():
		fix = shell.Advice("move the files to a directory writable only by root")
	}

	return warn(fix, "ignored because users other than root can change them: %s", strings.Join(all, "; "))
}

// firstYear is the earliest plausible year. An earlier clock would precede the validity of every
// certificate of the cluster.
const firstYear = 2020

func checkClock(f *Facts) result {
	fix := shell.Command("timedatectl set-ntp true")
	switch n := f.Node; {
	case n.Year < firstYear:
		return fail(fix, "the system clock is set to the year %d; certificates are not valid yet", n.Year)
	case n.ClockKnown && !n.ClockSynced:
		return warn(fix, "the system clock is not synchronized (adjtimex(2)); certificates and leases depend on it")
	}

	return ok("synchronized")
}

func checkDirectories(f *Facts) result {
	var all []string
	for _, d := range f.Node.Directories {
		switch {
		case d.ReadOnly != "":
			return fail(shell.Command("mount -o remount,rw {}", d.ReadOnly),
				"%s (--%s) is on a read-only file system", d.Path, d.Flag)
		case d.Error != "" && f.Root:
			return fail(shell.Command("chmod u+rwx {}", d.Path), "%s (--%s): %s", d.Path, d.Flag, d.Error)
		case d.Error != "":
			return skip("%s (--%s): %s", d.Path, d.Flag, d.Error)
		}

		all = append(all, d.Path)
	}

	return ok("%s", strings.Join(all, ", "))
}

// evictionDefaults returns the kubelet's default thresholds
// (pkg/kubelet/eviction/defaults_linux.go). Below a threshold the kubelet evicts pods and admits no
// new ones.
func evictionDefaults() map[string]string {
	return map[string]string{
		"nodefs.available":   "10%",
		"nodefs.inodesFree":  "5%",
		"imagefs.available":  "15%",
		"imagefs.inodesFree": "5%",
	}
}

func checkDisk(f *Facts) result {
	var all []string
	var nearlyFull *result
	for _, d := range f.Node.Disks {
		all = append(all, fmt.Sprintf("%s %s free", d.Path, percent(d.Free, d.Total)))
		for _, v := range f.diskResults(d) {
			switch {
			case v.status == Fail:
				return v
			case v.status == Warn && nearlyFull == nil:
				nearlyFull = &v
			}
		}
	}

	if nearlyFull != nil { // a full disk has priority over the order
		return *nearlyFull
	}

	return ok("%s", strings.Join(all, ", "))
}

// percent returns a share with one decimal, rounded down: a disk above a threshold of 15 % may have
// 15.3 %.
func percent(part, total uint64) string {
	tenths := math.Floor(float64(part) * 1000 / float64(max(total, 1)))
	return strconv.FormatFloat(tenths/10, 'f', -1, 64) + "%"
}

// diskResults compares the space and the inodes of a disk with the kubelet's thresholds.
func (f *Facts) diskResults(d Disk) []result {
	compare := func(resource, signal string, total, free uint64) result {
		setting, limit := f.threshold(signal, total)
		detail := fmt.Sprintf("%s has %s of its %s available; the kubelet evicts pods below %s (%s)",
			d.Path, percent(free, total), resource, setting, signal)
		switch {
		case total == 0: // the file system has no limit
			return ok("")
		case free < limit:
			return fail(freeDisk(d), "%s", detail)
		case free < limit+limit/4:
			return warn(freeDisk(d), "%s", detail)
		}

		return ok("")
	}

	return []result{
		compare("space", d.Signal+".available", d.Total, d.Free),
		compare("inodes", d.Signal+".inodesFree", d.Inodes, d.IFre),
	}
}

// freeDisk returns the line to free space on a disk: it removes only unused images or rotated logs.
func freeDisk(d Disk) shell.Line {
	if d.Signal == "imagefs" {
		return shell.Command("docker image prune -af")
	}
	return shell.Command(`find {} -type f -name '*.log.*' -delete`, d.Path)
}

// threshold returns the kubelet's hard eviction threshold for a signal, as configured and in the
// unit of total.
func (f *Facts) threshold(signal string, total uint64) (setting string, limit uint64) {
	value := evictionDefaults()[signal]
	if f.Kubelet.Config.EvictionHard != nil { // if set, signals without an entry have no threshold
		value = f.Kubelet.Config.EvictionHard[signal]
	}

	if p, isShare := strings.CutSuffix(value, "%"); isShare {
		percent, err := strconv.ParseFloat(p, 64)
		if err != nil || percent < 0 {
			return value, 0
		}
		return value, uint64(float64(total) * percent / 100)
	}

	n, _ := quantity.Parse(value) // the kubelet refuses to start with any other syntax

	return value, uint64(max(n, 0))
}

func checkGroup(f *Facts) result {
	fix := shell.Command("groupadd --system docker")
	switch {
	case f.Node.DockerGroup:
		return ok("the group exists")
	case f.Systemd && f.Daemon.Unit != "" && f.Daemon.Problem != "":
		return fail(fix, "the group docker does not exist, and systemd cannot create the daemon's socket")
	}

	return warn(fix, "the group docker does not exist: only root can use the sockets of Docker and of the daemon")
}

func checkOOM(f *Facts) result {
	switch {
	case f.Engine.Problem != "" || !f.Root:
		return skip("unknown")
	// the kubelet assigns -997 to critical pods, and sandboxes have -998
	case f.Engine.MinOOMScore > -998:
		return warn(shell.Advice("if this node is a container, add CAP_SYS_RESOURCE to it: docker run "+
			"--cap-add SYS_RESOURCE …"),
			"CAP_SYS_RESOURCE is missing: containers cannot have an oom_score_adj below %d, and the OOM killer may "+
				"kill critical pods first", f.Engine.MinOOMScore)
	}

	return ok("CAP_SYS_RESOURCE is available")
}

// sysctl returns the line to set a kernel parameter, now and at boot.
func sysctl(name, value string) shell.Line {
	return shell.Command("sysctl -w {} | tee -a /etc/sysctl.d/99-kubernetes.conf", name+"="+value)
}

func checkForward(f *Facts) result {
	switch f.Node.IPForward {
	case "":
		return skip("unknown")
	case "0":
		return fail(sysctl("net.ipv4.ip_forward", "1"),
			"net.ipv4.ip_forward is 0: pods have no network access outside of this node")
	}
	return ok("net.ipv4.ip_forward = %s", f.Node.IPForward)
}

func checkBridgeNF(f *Facts) result {
	const name = "net.bridge.bridge-nf-call-iptables"
	const why = "pods cannot reach a Service backed by a pod on the same node"
	switch {
	case !f.CNI.Bridge:
		return skip("the pod network has no bridge or is unknown")
	case f.Node.BridgeNF == "":
		return fail(shell.Command("modprobe br_netfilter && echo br_netfilter >> /etc/modules-load.d/kubernetes.conf").
			And(sysctl(name, "1")),
			"kernel module br_netfilter is not loaded: %s", why)

	case f.Node.BridgeNF == "0":
		return fail(sysctl(name, "1"), "%s is 0: %s", name, why)
	}

	return ok("%s = %s", name, f.Node.BridgeNF)
}
