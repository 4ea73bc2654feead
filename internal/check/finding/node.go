package finding

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cri-dockerd/internal/quantity"
	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/text"
)

func nodeRules() []rule {
	return []rule{
		{"privileges", "check sees everything", nil, judgePrivileges},
		{"file-owner", "only root can change what check reads", nil, judgeFileOwner},
		{"clock", "clock", nil, judgeClock},
		{"directories", "the daemon's directories can be written to", nil, judgeDirectories},
		{"disk", "disk space and inodes", nil, judgeDisk},
		{"docker-group", "group docker", nil, judgeGroup},
	}
}

func judgePrivileges(f *Facts) verdict {
	switch {
	case !f.Root:
		return warn(shell.Command("sudo cri-dockerd check"), "not root: what only root may read is not judged")
	case f.Foreign != "":
		return warn(shell.Advice("run cri-dockerd check on the host itself, outside containers"),
			"%s: processes outside the namespaces of check are not judged", f.Foreign)
	}

	return ok("root")
}

// fix takes a file out of the hands of others.
func (u Untrusted) fix() shell.Line {
	if u.Shared {
		return shell.Advice("move {} to a directory that only root can write to", u.File)
	}
	return shell.Command("chown root:root {} && chmod go-w {}", u.Because, u.Because)
}

// untrusted is why a file was not read, if it is that others can change it.
func (f *Facts) untrusted(file string) (Untrusted, bool) {
	i := slices.IndexFunc(f.Untrusted, func(u Untrusted) bool { return u.File == file && file != "" })
	if i < 0 {
		return Untrusted{}, false
	}
	return f.Untrusted[i], true
}

// maxUntrusted bounds how many files one finding names.
const maxUntrusted = 5

// judgeFileOwner reports the files that were not believed.
func judgeFileOwner(f *Facts) verdict {
	var fix shell.Line
	var all []string
	seen := map[string]bool{}
	for _, r := range f.Untrusted[:min(len(f.Untrusted), maxUntrusted)] {
		all = append(all, text.Clean(r.File+": "+r.Reason, text.MaxName/2))
		if r.Shared || seen[r.Because] {
			continue
		}
		seen[r.Because] = true
		fix = fix.And(r.fix())
	}

	if more := len(f.Untrusted) - maxUntrusted; more > 0 {
		all = append(all, fmt.Sprintf("and %d more", more))
	}

	switch {
	case len(all) == 0:
		return ok("all of them")
	case fix.IsZero():
		fix = shell.Advice("move the files to a directory that only root can write to")
	}

	return warn(fix, "not read, since other users can change them: %s", strings.Join(all, "; "))
}

// firstYear is when no clock that is right can have stood: certificates of a cluster would not be
// valid yet.
const firstYear = 2020

func judgeClock(f *Facts) verdict {
	fix := shell.Command("timedatectl set-ntp true")
	switch n := f.Node; {
	case n.Year < firstYear:
		return fail(fix, "the clock says it is %d; no certificate is valid then", n.Year)
	case n.ClockKnown && !n.ClockSynced:
		return warn(fix, "nothing keeps the clock right (adjtimex(2): not synchronised); certificates and leases "+
			"depend on it")
	}

	return ok("synchronised")
}

func judgeDirectories(f *Facts) verdict {
	var all []string
	for _, d := range f.Node.Directories {
		switch {
		case d.ReadOnly != "":
			return fail(shell.Command("mount -o remount,rw {}", d.ReadOnly),
				"%s (--%s) lies on a read-only file system", d.Path, d.Flag)
		case d.Error != "" && f.Root:
			return fail(shell.Command("chmod u+rwx {}", d.Path), "%s (--%s): %s", d.Path, d.Flag, d.Error)
		case d.Error != "":
			return skip("%s (--%s): %s", d.Path, d.Flag, d.Error)
		}

		all = append(all, d.Path)
	}

	return ok("%s", strings.Join(all, ", "))
}

// evictionDefaults are the kubelet's own (pkg/kubelet/eviction/defaults_linux.go): below, it evicts
// pods and takes no more.
func evictionDefaults() map[string]string {
	return map[string]string{
		"nodefs.available":   "10%",
		"nodefs.inodesFree":  "5%",
		"imagefs.available":  "15%",
		"imagefs.inodesFree": "5%",
	}
}

func judgeDisk(f *Facts) verdict {
	var all []string
	var nearlyFull *verdict
	for _, d := range f.Node.Disks {
		all = append(all, fmt.Sprintf("%s %d%% free", d.Path, d.Free*100/max(d.Total, 1)))
		for _, v := range f.diskVerdicts(d) {
			switch {
			case v.status == Fail:
				return v
			case v.status == Warn && nearlyFull == nil:
				nearlyFull = &v
			}
		}
	}

	if nearlyFull != nil { // a full disk comes first, whatever their order
		return *nearlyFull
	}

	return ok("%s", strings.Join(all, ", "))
}

// diskVerdicts judges the space and the inodes of a disk by the kubelet's thresholds.
func (f *Facts) diskVerdicts(d Disk) []verdict {
	judge := func(what, signal string, total, free uint64) verdict {
		setting, limit := f.threshold(signal, total)
		detail := fmt.Sprintf("%s has %d%% of its %s left; the kubelet evicts pods below %s (%s)",
			d.Path, free*100/max(total, 1), what, setting, signal)
		switch {
		case total == 0: // the file system does not count them
			return ok("")
		case free < limit:
			return fail(freeDisk(d), "%s", detail)
		case free < limit+limit/4:
			return warn(freeDisk(d), "%s", detail)
		}

		return ok("")
	}

	return []verdict{
		judge("space", d.Signal+".available", d.Total, d.Free),
		judge("inodes", d.Signal+".inodesFree", d.Inodes, d.IFre),
	}
}

// freeDisk is the line that frees space without touching what is used: images without a container,
// logs that the kubelet has rotated.
func freeDisk(d Disk) shell.Line {
	if d.Signal == "imagefs" {
		return shell.Command("docker image prune -af")
	}
	return shell.Command(`find {} -type f -name '*.log.*' -delete`, d.Path)
}

// threshold is the kubelet's hard eviction threshold for a signal, as it is set and in the unit of
// total.
func (f *Facts) threshold(signal string, total uint64) (setting string, limit uint64) {
	value := evictionDefaults()[signal]
	if f.Kubelet.Config.EvictionHard != nil { // with any, those that are not named are off
		value = f.Kubelet.Config.EvictionHard[signal]
	}

	if p, isShare := strings.CutSuffix(value, "%"); isShare {
		percent, err := strconv.ParseFloat(p, 64)
		if err != nil || percent < 0 {
			return value, 0
		}
		return value, uint64(float64(total) * percent / 100)
	}

	n, _ := quantity.Parse(value) // the kubelet does not start with anything else

	return value, uint64(max(n, 0))
}

func judgeGroup(f *Facts) verdict {
	fix := shell.Command("groupadd --system docker")
	switch {
	case f.Node.DockerGroup:
		return ok("it may use the daemon's socket")
	case f.Systemd && f.Daemon.Unit != "" && f.Daemon.Problem != "":
		return fail(fix, "there is no group docker, to which systemd is to give the socket")
	}

	return warn(fix, "there is no group docker: only root may use the sockets of Docker and of this daemon")
}

func judgeOOM(f *Facts) verdict {
	switch {
	case f.Engine.Problem != "" || !f.Root:
		return skip("not known")
	// what the kubelet gives to critical pods is -997, to sandboxes -998
	case f.Engine.MinOOMScore > -998:
		return warn(shell.Advice("give this machine CAP_SYS_RESOURCE, if it is a container itself: docker run "+
			"--cap-add SYS_RESOURCE …"),
			"CAP_SYS_RESOURCE is missing: no container can have an oom_score_adj below %d, and when memory is "+
				"short, pods that matter may be killed first", f.Engine.MinOOMScore)
	}

	return ok("CAP_SYS_RESOURCE is there")
}

// sysctl is the line that sets a kernel parameter now and at boot.
func sysctl(name, value string) shell.Line {
	return shell.Command("sysctl -w {} | tee -a /etc/sysctl.d/99-kubernetes.conf", name+"="+value)
}

func judgeForward(f *Facts) verdict {
	switch f.Node.IPForward {
	case "":
		return skip("not known")
	case "0":
		return fail(sysctl("net.ipv4.ip_forward", "1"), "net.ipv4.ip_forward is 0: no packet of a pod leaves this node")
	}
	return ok("net.ipv4.ip_forward = %s", f.Node.IPForward)
}

func judgeBridgeNF(f *Facts) verdict {
	const name = "net.bridge.bridge-nf-call-iptables"
	const why = "packets between pods of this node pass by the services' rules, and a service does not answer the " +
		"pods beside its own"
	switch {
	case !f.CNI.Bridge:
		return skip("the pod network has no bridge, or is not known yet")
	case f.Node.BridgeNF == "":
		return fail(shell.Command("modprobe br_netfilter && echo br_netfilter >> /etc/modules-load.d/kubernetes.conf").
			And(sysctl(name, "1")),
			"the kernel has not loaded br_netfilter: %s", why)

	case f.Node.BridgeNF == "0":
		return fail(sysctl(name, "1"), "%s is 0: %s", name, why)
	}

	return ok("%s = %s", name, f.Node.BridgeNF)
}
