package probe

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/podnet"
)

// node gathers the state of the host.
func (p *Prober) node(ctx context.Context, cfg *config.Config, socket string) finding.Node {
	n := finding.Node{
		Year:        time.Now().Year(),
		CgroupV1:    isCgroupV1(p.path("/sys/fs/cgroup")),
		IPForward:   p.kernel("/proc/sys/net/ipv4/ip_forward"),
		BridgeNF:    p.kernel("/proc/sys/net/bridge/bridge-nf-call-iptables"),
		Overlay:     p.hasOverlay(),
		DockerGroup: p.hasGroup("docker"),
		FstabSwap:   p.hasFstabSwap(),
		Swaps:       p.swaps(),
		OtherCRI:    p.otherCRI(ctx, socket),
		Load:        p.load(),
	}

	var clock unix.Timex
	state, err := unix.Adjtimex(&clock)
	n.ClockKnown = err == nil
	n.ClockSynced = state != unix.TIME_ERROR && clock.Status&unix.STA_UNSYNC == 0

	n.Directories = []finding.Directory{
		p.directory("run-directory", cfg.RunDirectory),
		p.directory("cri-dockerd-root-directory", cfg.RootDirectory),
	}

	return n
}

// isCgroupV1 reports whether the host uses cgroup v1 or both versions. The kubelet uses the same
// test.
func isCgroupV1(root string) bool {
	var st unix.Statfs_t
	return unix.Statfs(root, &st) == nil && st.Type != unix.CGROUP2_SUPER_MAGIC
}

// swaps returns the active swap devices and files (proc_swaps(5)).
func (p *Prober) swaps() []string {
	var out []string
	for line := range strings.Lines(p.kernel("/proc/swaps")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] != "Filename" {
			out = append(out, f[0])
		}
	}
	return out
}

// hasFstabSwap reports whether fstab(5) enables swap at boot.
func (p *Prober) hasFstabSwap() bool {
	for line := range strings.Lines(p.read("/etc/fstab")) {
		if f := strings.Fields(line); len(f) > 2 && !strings.HasPrefix(f[0], "#") && f[2] == "swap" {
			return true
		}
	}
	return false
}

func (p *Prober) hasOverlay() bool {
	for line := range strings.Lines(p.kernel("/proc/filesystems")) {
		if strings.HasSuffix(strings.TrimSpace(line), "\toverlay") {
			return true
		}
	}
	return false
}

func (p *Prober) hasGroup(name string) bool {
	for line := range strings.Lines(p.read("/etc/group")) {
		if strings.HasPrefix(line, name+":") {
			return true
		}
	}
	return false
}

// otherCRI returns the sockets of other CRI servers from kubeadm's list, if a process of root
// listens on them.
func (p *Prober) otherCRI(ctx context.Context, own string) []string {
	ctx, cancel := context.WithTimeout(ctx, p.timeout/3)
	defer cancel()

	var out []string
	for _, path := range []string{"/run/containerd/containerd.sock", "/run/crio/crio.sock"} {
		c, _, err := dial(ctx, p.path(path))
		if err != nil {
			continue
		}

		c.Close()
		if path == own {
			continue
		}

		out = append(out, "unix:///var"+path)
	}

	return out
}

// directory tests write access to a directory or to its nearest existing parent.
func (p *Prober) directory(flag, path string) finding.Directory {
	d := finding.Directory{Path: path, Flag: flag}
	existing := p.path(path)
	for !pathExists(existing) && existing != filepath.Dir(existing) {
		existing = filepath.Dir(existing)
	}

	err := unix.Access(existing, unix.W_OK)
	switch {
	case errors.Is(err, unix.EROFS):
		d.ReadOnly, d.Error = p.mountPoint(existing), err.Error()
	case err != nil:
		d.Error = err.Error()
	}

	return d
}

func pathExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// mountPoint returns the mount point of the file system of a path: the longest matching mount in
// /proc/self/mountinfo (proc_pid_mountinfo(5)), and "/" if that cannot be parsed.
func (p *Prober) mountPoint(path string) string {
	best := "/"
	mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(p.kernel("/proc/self/mountinfo")), nil)
	if err != nil {
		return best
	}

	for _, m := range mounts {
		isAbove := path == m.Mountpoint || strings.HasPrefix(path, strings.TrimSuffix(m.Mountpoint, "/")+"/")
		if isAbove && len(m.Mountpoint) >= len(best) {
			best = m.Mountpoint
		}
	}

	return best
}

// disks returns the file systems of Docker, of the logs and of the kubelet.
func (p *Prober) disks(dockerRoot string) []finding.Disk {
	if dockerRoot == "" {
		dockerRoot = "/var/lib/docker"
	}

	var out []finding.Disk
	for _, d := range []finding.Disk{
		{Path: dockerRoot, Signal: "imagefs"},
		{Path: "/var/log/pods", Signal: "nodefs"},
		{Path: "/var/lib/kubelet", Signal: "nodefs"},
	} {
		var st unix.Statfs_t
		if unix.Statfs(p.path(d.Path), &st) != nil {
			continue // does not exist yet
		}

		size := uint64(st.Bsize)
		d.Total, d.Free = st.Blocks*size, st.Bavail*size
		d.Inodes, d.IFre = st.Files, st.Ffree
		out = append(out, d)
	}

	return out
}

// cni reads the CNI configurations and searches the required plugins.
func (p *Prober) cni(cfg *config.Config) finding.CNI {
	var c finding.CNI
	var required, dirs []string
	for _, d := range cfg.CNIBinDirs {
		dirs = append(dirs, p.path(d))
	}

	switch cfg.NetworkPlugin {
	case "cni":
		files, err := podnet.Inspect(p.path(cfg.CNIConfDir), p.readable)
		if err != nil {
			c.Error = err.Error()
		}
		c.Files, required = p.cniFiles(files, dirs)

	case "kubenet":
		required = podnet.KubenetPlugins()
	}

	for _, name := range required {
		c.Bridge = c.Bridge || name == "bridge" || name == "flannel" // flannel creates a bridge
		if _, err := podnet.Find(name, dirs); err == nil {
			continue
		}

		c.Missing = append(c.Missing, name)
		if path := p.findPlugin(name); path != "" {
			if c.Found == nil {
				c.Found = map[string]string{}
			}
			c.Found[name] = path
		}
	}

	return c
}

// findPlugin searches the plugin directories of add-ons, Debian and Fedora. It returns a path or
// "".
func (p *Prober) findPlugin(name string) string {
	if !filepath.IsLocal(name) || filepath.Base(name) != name {
		return "" // a path is not a valid plugin name
	}

	for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", "/usr/local/lib/cni"} {
		if f, err := p.open(dir + "/" + name); err == nil {
			f.Close()
			return dir + "/" + name
		}
	}

	return ""
}

// cniFiles returns the configurations, and the plugins required by the one in effect. Like the
// daemon, it prefers a configuration with an installed main plugin.
func (p *Prober) cniFiles(files []podnet.ConfFile, binDirs []string) (out []finding.CNIFile, required []string) {
	isUsable := func(f podnet.ConfFile) bool {
		if f.Err != nil {
			return false
		}
		_, err := podnet.Find(f.Plugins[0], binDirs)
		return err == nil
	}

	used := slices.IndexFunc(files, isUsable)
	for i, f := range files {
		o := finding.CNIFile{File: strings.TrimPrefix(f.File, p.root), Network: f.Network}
		switch {
		case f.Err != nil:
			o.Error = f.Err.Error()
		case i < used:
			o.Error = "plugin " + f.Plugins[0] + " is not installed"
		case required == nil:
			required = f.Plugins
		}

		out = append(out, o)
	}

	return out, required
}

// readable returns an error if users other than root can change a file, or if it is too large.
func (p *Prober) readable(file string) error {
	_, err := p.trusted(strings.TrimPrefix(file, p.root))
	return err
}
