// Package sandbox starts and manages the pause of a pod without an OCI runtime. It starts only
// specs that it understands completely; NewPlan gives the reason against all others. See
// docs/adr/0011.
package sandbox

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/bundle"
)

// Plan describes the start of a pause.
type Plan struct {
	root     string
	args     []string
	env      []string
	uid, gid uint32
	groups   []uint32
	flags    uintptr // of unshare(2)
	netns    string  // path of the network namespace to join, "" for the node's
	hostname string  // of a new UTS namespace, "" to keep it
	sysctls  map[string]string
	apparmor string
	filter   []unix.SockFilter
	oomScore *int
	cgroup   string
	limits   *specs.LinuxResources
}

// namespaceFlags are the namespaces of a spec that a pause gets from unshare(2). It joins a network
// namespace. It gets no cgroup and no time namespace: nothing in it reads control groups or clocks,
// and no container joins them.
var namespaceFlags = map[specs.LinuxNamespaceType]uintptr{
	specs.MountNamespace:  unix.CLONE_NEWNS,
	specs.UTSNamespace:    unix.CLONE_NEWUTS,
	specs.IPCNamespace:    unix.CLONE_NEWIPC,
	specs.PIDNamespace:    unix.CLONE_NEWPID,
	specs.CgroupNamespace: 0,
	specs.TimeNamespace:   0,
}

// NewPlan returns the plan for the pause of a bundle, or the reason why an OCI runtime must start
// it.
func NewPlan(b *bundle.Bundle) (p *Plan, reason string) {
	if reason := unsupported(b); reason != "" {
		return nil, reason
	}

	s := b.Spec
	p = &Plan{
		root:     s.Root.Path,
		args:     s.Process.Args,
		env:      s.Process.Env,
		uid:      s.Process.User.UID,
		gid:      s.Process.User.GID,
		groups:   s.Process.User.AdditionalGids,
		sysctls:  s.Linux.Sysctl,
		apparmor: s.Process.ApparmorProfile,
		oomScore: s.Process.OOMScoreAdj,
		cgroup:   s.Linux.CgroupsPath,
		limits:   s.Linux.Resources,
	}
	if b.Want.StrictGroups != nil {
		p.groups = *b.Want.StrictGroups
	}

	// Docker adds the primary group for programs that change their group. The pause cannot.
	p.groups = slices.DeleteFunc(slices.Clone(p.groups), func(g uint32) bool { return g == p.gid })

	if b.UsesSystemd() {
		p.cgroup, _ = scopePath(p.cgroup) // unsupported has checked it
	}

	if reason := p.setNamespaces(s, b.Want.Sandbox.NetNS); reason != "" {
		return nil, reason
	}

	if s.Linux.Seccomp != nil {
		filter, err := compile(s.Linux.Seccomp)
		if err != nil {
			return nil, fmt.Sprintf("seccomp: %v", err)
		}
		p.filter = filter
	}

	return p, ""
}

// unsupported returns the reason why a spec is not the plain one of a pause.
func unsupported(b *bundle.Bundle) string {
	s := b.Spec
	switch {
	case b.Want.Sandbox == nil:
		return "it is not the pause of a pod"
	case s.Process == nil || s.Linux == nil || s.Root == nil:
		return "the spec is incomplete"
	case !filepath.IsAbs(s.Root.Path):
		return "the root is relative to the bundle"
	case len(s.Process.Args) == 0 || !filepath.IsAbs(s.Process.Args[0]):
		return "the program has no absolute path"
	case s.Hooks != nil:
		return "the spec has hooks"
	}

	return cmp.Or(unsupportedProcess(s.Process), unsupportedLinux(b))
}

func unsupportedProcess(p *specs.Process) string {
	switch {
	case p.Terminal:
		return "the process has a terminal"
	case !p.NoNewPrivileges:
		return "the process may gain privileges"
	case p.SelinuxLabel != "":
		return "the process has an SELinux label"
	case len(p.Rlimits) > 0:
		return "the process has limits (rlimits)"
	case p.Scheduler != nil || p.IOPriority != nil || p.ExecCPUAffinity != nil:
		return "the process has a scheduling class"
	}

	return ""
}

func unsupportedLinux(b *bundle.Bundle) string {
	l := b.Spec.Linux
	switch {
	case b.UsesSystemd():
		if reason := unsupportedScope(b); reason != "" {
			return reason
		}
	case !strings.HasPrefix(l.CgroupsPath, "/") || filepath.Clean(l.CgroupsPath) != l.CgroupsPath:
		return "the path of the control group is not absolute"
	case !strings.Contains(filepath.Base(l.CgroupsPath), filepath.Base(b.Dir)):
		return "the control group is not the container's own" // Clean kills everything in it
	}

	switch {
	case l.MountLabel != "":
		return "the spec has an SELinux label of mounts"
	case len(l.UIDMappings)+len(l.GIDMappings) > 0 || b.Want.UserNS != nil:
		return "the spec has a user namespace"
	case l.IntelRdt != nil || l.Personality != nil || len(l.TimeOffsets) > 0:
		return "the spec has unusual properties"
	}

	for name := range l.Sysctl {
		if !isIPCSysctl(name) {
			return fmt.Sprintf("sysctl %s does not belong to the IPC namespace", name)
		}
	}

	return ""
}

// unsupportedScope returns the reason why systemd cannot manage the control group of a pause.
func unsupportedScope(b *bundle.Bundle) string {
	path, err := scopePath(b.Spec.Linux.CgroupsPath)
	switch {
	case err != nil:
		return fmt.Sprintf("control group: %v", err)
	case !strings.Contains(filepath.Base(path), filepath.Base(b.Dir)):
		return "the control group is not the container's own"
	}

	return ""
}

// isIPCSysctl reports whether a sysctl belongs to the IPC namespace (namespaces(7), Kubernetes'
// safe and unsafe namespaced sysctls). The name is safe as a part of a path.
func isIPCSysctl(name string) bool {
	if strings.ContainsAny(name, "/\x00") || strings.Contains(name, "..") {
		return false
	}
	return strings.HasPrefix(name, "kernel.shm") || strings.HasPrefix(name, "kernel.msg") || name == "kernel.sem" ||
		strings.HasPrefix(name, "fs.mqueue.")
}

// setNamespaces sets the namespaces of the plan. netns replaces the path of the spec, unless it is
// "".
func (p *Plan) setNamespaces(s *specs.Spec, netns string) (reason string) {
	createsNetNS := false // a spec without a network namespace shares the node's
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			p.netns, createsNetNS = ns.Path, ns.Path == ""
			continue
		}

		flag, known := namespaceFlags[ns.Type]
		switch {
		case !known:
			return fmt.Sprintf("the spec has a %s namespace", ns.Type)
		case ns.Path != "":
			return fmt.Sprintf("the pause joins a %s namespace", ns.Type)
		}
		p.flags |= flag
	}

	if netns != "" {
		p.netns, createsNetNS = netns, false
	}

	hasSysctls := len(p.sysctls) > 0
	switch {
	case p.flags&unix.CLONE_NEWNS == 0:
		return "the pause has no mount namespace"
	case createsNetNS:
		return "the engine creates the network namespace"
	case hasSysctls && p.flags&unix.CLONE_NEWIPC == 0:
		return "the sysctls would change the node"
	}

	if p.flags&unix.CLONE_NEWUTS != 0 {
		p.hostname = s.Hostname
	}

	return ""
}
