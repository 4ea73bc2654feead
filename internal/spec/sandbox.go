package spec

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	sandboxShares = 2 // the pause needs next to no CPU
	sandboxOOM    = -998
	defaultShm    = 64 << 20 // bytes, what Docker gives by default
)

// PauseImage is the image that sandboxes are created from.
type PauseImage struct {
	Source string // a name or an ID that the engine takes
	Name   string // as users know it
}

// SandboxOptions are the circumstances in which a sandbox is made.
type SandboxOptions struct {
	Host           Host
	Image          PauseImage
	RuntimeHandler string // of the request; "" is the engine's default runtime
	// "none" or "bridge", for pods with a network of their own that the engine makes
	NetworkMode string
	// path of a network namespace that the pause is to join instead; "" for none. See EngineNetNS
	NetNS          string
	SeccompProfile string // the content of the Localhost profile, see SeccompFile
}

// NewSandbox translates RunPodSandbox's configuration, which must have passed Validate, into the
// pause container. Errors are InvalidArgument and name the field.
func NewSandbox(cfg *runtimeapi.PodSandboxConfig, o SandboxOptions) (*Create, error) {
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	runtime, err := ociRuntime(o.RuntimeHandler, o.Host)
	if err != nil {
		return nil, fmt.Errorf("runtime_handler: %w", err)
	}

	name, join := SandboxName(cfg.GetMetadata()), o.NetNS != "" && ns.GetNetwork() != runtimeapi.NamespaceMode_NODE
	labels, err := sandboxLabels(name, cfg, o, join)
	if err != nil {
		return nil, err
	}

	c := &Create{
		Name: name,
		Config: &container.Config{
			Hostname: cfg.GetHostname(),
			Image:    o.Image.Source,
			Labels:   labels,
		},
		Host: &container.HostConfig{
			LogConfig:     container.LogConfig{Type: "none"},
			RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
			NetworkMode:   container.NetworkMode(o.NetworkMode),
			IpcMode:       container.IPCModeShareable,
			OomScoreAdj:   o.Host.clampOOM(sandboxOOM),
			ShmSize:       defaultShm,
			Runtime:       runtime,
			SecurityOpt:   []string{"no-new-privileges"},
			// process 1 is the pause, which joins the network namespace and reaps
			Init:        new(bool),
			Annotations: shimGroup(o.Host, name),
			Resources: container.Resources{
				CgroupParent: cgroupParent(cfg.GetLinux().GetCgroupParent(), o.Host),
				CPUShares:    sandboxShares,
			},
		},
	}
	if err := sandboxNamespaces(c, cfg, ns, o); err != nil {
		return nil, err
	}

	if err := sandboxSecurity(c, cfg.GetLinux().GetSecurityContext(), o); err != nil {
		return nil, err
	}

	if join {
		joinNetNS(c, o.NetNS)
	}

	return c, nil
}

// sandboxLabels are the sandbox's record and the labels that other tools read. ownNetNS says that
// the pause joins a network namespace of ours.
func sandboxLabels(
	name string, cfg *runtimeapi.PodSandboxConfig, o SandboxOptions, ownNetNS bool,
) (map[string]string, error) {
	r := &record{
		Name:        name,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Sandbox: &sandboxRecord{
			Image:    o.Image.Name,
			Handler:  o.RuntimeHandler,
			Pid:      cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid().String(),
			OwnNetNS: ownNetNS,
			PodResources: PodResources{
				Overhead:  cfg.GetLinux().GetOverhead(),
				Resources: cfg.GetLinux().GetResources(),
			},
		},
	}

	return r.write(map[string]string{
		labelType: typeSandbox,
		labelName: pauseName,
	})
}

// sandboxNamespaces sets network, ipc, pid and what depends on them.
func sandboxNamespaces(
	c *Create, cfg *runtimeapi.PodSandboxConfig, ns *runtimeapi.NamespaceOption, o SandboxOptions,
) error {
	if ns.GetIpc() == runtimeapi.NamespaceMode_NODE {
		c.Host.IpcMode = "host"
	}
	if ns.GetPid() == runtimeapi.NamespaceMode_NODE {
		c.Host.PidMode = "host"
	}
	if o.Host.MapsUsers() && needsHostUsers(cfg.GetLinux().GetSecurityContext()) {
		c.Host.UsernsMode = hostUsers
	}

	c.Host.Sysctls = cfg.GetLinux().GetSysctls()
	if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE {
		c.Host.NetworkMode, c.Host.UTSMode, c.Config.Hostname = "host", "host", ""
		for k := range c.Host.Sysctls {
			if strings.HasPrefix(k, "net.") {
				return fmt.Errorf("config.linux.sysctls[%s]: a pod on the host network cannot set it: %w", k,
					errdefs.ErrInvalidArgument)
			}
		}

		return nil
	}

	if c.Host.NetworkMode == networkBridge {
		return bindPorts(c, cfg.GetPortMappings())
	}

	return nil
}

// bindPorts publishes host ports on the engine's own bridge; with other networks they are the
// network's work.
func bindPorts(c *Create, ports []*runtimeapi.PortMapping) error {
	for i, p := range ports {
		if p.GetHostPort() <= 0 {
			continue
		}

		port, ok := network.PortFrom(uint16(p.GetContainerPort()),
			network.IPProtocol(strings.ToLower(p.GetProtocol().String())))
		if !ok {
			return fmt.Errorf("config.port_mappings[%d]: %v is not a port: %w", i, p, errdefs.ErrInvalidArgument)
		}

		b := network.PortBinding{HostPort: fmt.Sprint(p.GetHostPort())}
		if p.GetHostIp() != "" {
			ip, err := netip.ParseAddr(p.GetHostIp())
			if err != nil {
				return fmt.Errorf("config.port_mappings[%d].host_ip: %w: %w", i, err, errdefs.ErrInvalidArgument)
			}
			b.HostIP = ip
		}

		if c.Host.PortBindings == nil {
			c.Host.PortBindings, c.Config.ExposedPorts = network.PortMap{}, network.PortSet{}
		}

		c.Host.PortBindings[port] = append(c.Host.PortBindings[port], b)
		c.Config.ExposedPorts[port] = struct{}{}
	}

	return nil
}

func sandboxSecurity(c *Create, sc *runtimeapi.LinuxSandboxSecurityContext, o SandboxOptions) error {
	const field = "config.linux.security_context"
	c.Host.Privileged = sc.GetPrivileged()
	c.Host.ReadonlyRootfs = sc.GetReadonlyRootfs()
	user, err := processUser(field, sc.GetRunAsUser(), sc.GetRunAsGroup(), "")
	if err != nil {
		return err
	}

	c.Config.User = user
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Strict {
		return errStrictGroups(field)
	}

	c.Host.GroupAdd = groups(sc.GetSupplementalGroups())
	opts, err := securityOptions(field, securityInput{
		seccomp:  sandboxSeccomp(sc),
		apparmor: sc.GetApparmor(),
		selinux:  sc.GetSelinuxOptions(),
		profile:  o.SeccompProfile,
	}, o.Host)

	c.Host.SecurityOpt = append(c.Host.SecurityOpt, opts...)

	return err
}

// CheckRuntime says whether the engine has a runtime for a handler; InvalidArgument, naming the
// field, if it has none.
func CheckRuntime(field, handler string, h Host) error {
	if _, err := ociRuntime(handler, h); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}

// ociRuntime is the engine's runtime for a handler: one that it has configured or, from Engine 23
// on, a containerd shim by its name.
func ociRuntime(handler string, h Host) (string, error) {
	if handler == "" {
		return "", nil
	}
	if slices.Contains(h.Runtimes, handler) {
		return handler, nil
	}

	if shimName.MatchString(handler) {
		if h.AtLeast("1.42") {
			// whether it is installed only the engine knows; it says so before the sandbox starts
			return handler, nil
		}
		return "", fmt.Errorf("Docker Engine %s cannot run containerd's shim %q; Engine 23 can: %w", h.EngineVersion,
			handler, errdefs.ErrInvalidArgument)
	}

	return "", fmt.Errorf("the engine has no runtime %q (it has: %s); add it to the engine's daemon.json: %w",
		handler, strings.Join(h.Runtimes, ", "), errdefs.ErrInvalidArgument)
}

// shimName is how containerd names its shims; io.containerd.kata.v2 is the program
// containerd-shim-kata-v2 (containerd, runtime v2).
var shimName = regexp.MustCompile(`^io\.containerd\.[a-zA-Z0-9_-]+\.v[0-9]+$`)

// cgroupParent is a CRI cgroup parent as the engine wants it: with the systemd driver the slice's
// name alone.
func cgroupParent(parent string, h Host) string {
	if parent != "" && h.CgroupDriver == "systemd" {
		return path.Base(parent)
	}
	return parent
}

// shimGroup makes containerd's runc shim serve all containers of a pod from one process; engines
// before API 1.43 have no annotations.
func shimGroup(h Host, sandbox string) map[string]string {
	if !h.AtLeast("1.43") {
		return nil
	}
	return map[string]string{labelShimGroupKey: sandbox}
}

// ResolvConf is the content of a pod's resolv.conf (CRI DNSConfig).
func ResolvConf(d *runtimeapi.DNSConfig) []byte {
	var b strings.Builder
	for _, s := range d.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}

	if s := d.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	if o := d.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(o, " "))
	}

	return []byte(b.String())
}

// Hosts is the content of a pod's hosts file: what every node calls itself, and the pod's name with
// its addresses.
func Hosts(hostname string, ips []netip.Addr) []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, ip := range ips {
		if hostname != "" {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}

	return []byte(b.String())
}
