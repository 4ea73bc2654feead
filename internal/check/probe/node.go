package probe

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/podnet"
)

// node looks at the machine itself.
func (p *Prober) node(ctx context.Context, cfg *config.Config, socket string) finding.Node {
	n := finding.Node{
		Year:        time.Now().Year(),
		CgroupV1:    cgroupV1(p.path("/sys/fs/cgroup")),
		IPForward:   p.kernel("/proc/sys/net/ipv4/ip_forward"),
		BridgeNF:    p.kernel("/proc/sys/net/bridge/bridge-nf-call-iptables"),
		Overlay:     p.hasOverlay(),
		DockerGroup: p.hasGroup("docker"),
		FstabSwap:   p.fstabSwap(),
		Swaps:       p.swaps(),
		OtherCRI:    p.otherCRI(ctx, socket),
	}

	var clock unix.Timex
	state, err := unix.Adjtimex(&clock)
	n.ClockKnown, n.ClockSynced = err == nil, state != unix.TIME_ERROR && clock.Status&unix.STA_UNSYNC == 0
	for _, d := range []struct{ flag, path string }{{"run-directory", cfg.RunDirectory},
		{"cri-dockerd-root-directory", cfg.RootDirectory}} {
		n.Directories = append(n.Directories, p.directory(d.flag, d.path))
	}

	return n
}

// cgroupV1 says whether the control groups are not version 2 alone, by the same look as the
// kubelet's.
func cgroupV1(root string) bool {
	var st unix.Statfs_t
	return unix.Statfs(root, &st) == nil && st.Type != unix.CGROUP2_SUPER_MAGIC
}

// swaps are the active swap devices and files (proc_swaps(5)).
func (p *Prober) swaps() []string {
	var out []string
	for line := range strings.Lines(p.kernel("/proc/swaps")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] != "Filename" {
			out = append(out, f[0])
		}
	}
	return out
}

func (p *Prober) fstabSwap() bool {
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

// otherCRI are the sockets of other CRI servers that kubeadm would find, if a process of root
// listens there.
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

// directory finds out whether a directory, or what exists of the path to it, can be written to.
func (p *Prober) directory(flag, path string) finding.Directory {
	d := finding.Directory{Path: path, Flag: flag}
	there := p.path(path)
	for !isThere(there) && there != filepath.Dir(there) {
		there = filepath.Dir(there)
	}

	err := unix.Access(there, unix.W_OK)
	switch {
	case errors.Is(err, unix.EROFS):
		d.ReadOnly, d.Error = p.mountPoint(there), err.Error()
	case err != nil:
		d.Error = err.Error()
	}

	return d
}

func isThere(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// mountPoint is where the file system of a path is mounted: the nearest folder above it on another
// device, or that is a mount.
func (p *Prober) mountPoint(path string) string {
	best := "/"
	for line := range strings.Lines(p.kernel("/proc/self/mountinfo")) { // proc_pid_mountinfo(5)
		f := strings.Fields(line)
		if len(f) > 4 && len(f[4]) >= len(best) &&
			(path == f[4] || strings.HasPrefix(path, strings.TrimSuffix(f[4], "/")+"/")) {
			best = f[4]
		}
	}

	return best
}

// disks are the file systems that fill up: Docker's, and that of the logs.
func (p *Prober) disks(dockerRoot string) []finding.Disk {
	if dockerRoot == "" {
		dockerRoot = "/var/lib/docker"
	}

	var out []finding.Disk
	for _, d := range []finding.Disk{{Path: dockerRoot, Signal: "imagefs"}, {Path: "/var/log/pods", Signal: "nodefs"},
		{Path: "/var/lib/kubelet", Signal: "nodefs"}} {
		var st unix.Statfs_t
		if unix.Statfs(p.path(d.Path), &st) != nil {
			continue // made later, by who needs it
		}
		size := uint64(st.Bsize)
		d.Total, d.Free, d.Inodes, d.IFre = st.Blocks*size, st.Bavail*size, st.Files, st.Ffree
		out = append(out, d)
	}

	return out
}

// cni reads the configurations and looks for the plugins that the network needs.
func (p *Prober) cni(cfg *config.Config) finding.CNI {
	var c finding.CNI
	var need, dirs []string
	for _, d := range cfg.CNIBinDirs {
		dirs = append(dirs, p.path(d))
	}

	switch cfg.NetworkPlugin {
	case "cni":
		files, err := podnet.Inspect(p.path(cfg.CNIConfDir), p.readable)
		if err != nil {
			c.Error = err.Error()
		}
		c.Files, need = p.cniFiles(files, dirs)

	case "kubenet":
		need = podnet.KubenetPlugins()
	}

	for _, name := range need {
		c.Bridge = c.Bridge || name == "bridge" || name == "flannel" // which makes a bridge
		if _, err := podnet.Find(name, dirs); err == nil {
			continue
		}

		c.Missing = append(c.Missing, name)
		// of add-ons, Debian, Fedora
		for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", "/usr/local/lib/cni"} {
			if !filepath.IsLocal(name) || filepath.Base(name) != name {
				break // a path of its own is no plugin
			}

			if f, err := p.open(dir + "/" + name); err == nil {
				f.Close()
				if c.Found == nil {
					c.Found = map[string]string{}
				}
				c.Found[name] = dir + "/" + name
				break
			}
		}
	}

	return c
}

// cniFiles are the configurations, and the plugins of the one that the daemon uses: it passes over
// a file whose main plugin is not installed if there is one whose main plugin is.
func (p *Prober) cniFiles(files []podnet.ConfFile, binDirs []string) (out []finding.CNIFile, need []string) {
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
			o.Error = "its plugin " + f.Plugins[0] + " is not installed"
		case need == nil:
			need = f.Plugins
		}

		out = append(out, o)
	}

	return out, need
}

// readable returns an error if a file is not to be read: others can change it, or it is too large.
func (p *Prober) readable(file string) error {
	_, err := p.trusted(strings.TrimPrefix(file, p.root))
	return err
}
