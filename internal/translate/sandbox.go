package translate

import (
	"fmt"
	"net/netip"
	"path"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const (
	sandboxShares = 2 // the pause process needs almost no CPU
	sandboxOOM    = -998
	defaultShm    = 64 << 20 // bytes, Docker's default
)

// SandboxOptions is the context of a new sandbox.
type SandboxOptions struct {
	Host           model.Host
	Image          model.PauseImage
	RuntimeHandler string // of the request; "" is the engine's default runtime
	// NetworkMode is a result of model.NetworkMode, for pods with a network namespace of the
	// engine.
	NetworkMode string
	// NetNS is the path of a network namespace that the pause process joins instead; "" for none.
	// See EngineNetNS.
	NetNS          string
	SeccompProfile string // content of SandboxSeccompFile
	Plugins        bool   // NRI plugins must see the pod
}

// NewSandbox translates the configuration of RunPodSandbox into the pause container. The request
// must have passed validate.Request and validate.Sandbox. Errors are InvalidArgument and name the
// field.
func NewSandbox(cfg *runtimeapi.PodSandboxConfig, o SandboxOptions) (*Create, error) {
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
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
			OomScoreAdj:   o.Host.ClampOOMScore(sandboxOOM),
			ShmSize:       defaultShm,
			Runtime:       o.runtime(),
			SecurityOpt:   []string{"no-new-privileges"},
			// process 1 is the pause process: it joins the network namespace and reaps zombies
			Init:        new(bool),
			Annotations: shimGroup(o.Host, name),
			Resources: container.Resources{
				CgroupParent: cgroupParent(cfg.GetLinux().GetCgroupParent(), o.Host),
				CPUShares:    sandboxShares,
			},
		},
	}
	setSandboxNamespaces(c, cfg, ns, o)
	if err := setSandboxSecurity(c, cfg.GetLinux().GetSecurityContext(), o); err != nil {
		return nil, err
	}

	if o.usesShim() {
		return c, shimSandbox(c, cfg, o, join)
	}
	if join {
		joinNetNS(c, o.NetNS)
	}

	return c, nil
}

// sandboxLabels returns the sandbox's record and the labels for other tools. ownNetNS is set if the
// pause process joins a network namespace of this program.
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
			UserNS:   podUserNS(cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()),
			Plugins:  o.Plugins,
			PodResources: model.PodResources{
				Overhead:  cfg.GetLinux().GetOverhead(),
				Resources: cfg.GetLinux().GetResources(),
			},
		},
	}

	return r.write(map[string]string{
		labelType: typeSandbox,
		labelName: model.PauseName,
	})
}

// setSandboxNamespaces sets the namespaces, sysctls and host ports of a sandbox.
func setSandboxNamespaces(
	c *Create, cfg *runtimeapi.PodSandboxConfig, ns *runtimeapi.NamespaceOption, o SandboxOptions,
) {
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
	} else if c.Host.NetworkMode == model.NetworkBridge {
		bindPorts(c, cfg.GetPortMappings())
	}
}

// bindPorts publishes host ports on the engine's own bridge. Package podnet publishes them on other
// networks.
func bindPorts(c *Create, ports []*runtimeapi.PortMapping) {
	for _, p := range ports {
		if p.GetHostPort() <= 0 {
			continue
		}

		// validate.Request has checked port, protocol and address; "" is the zero address.
		port, _ := network.PortFrom(uint16(p.GetContainerPort()),
			network.IPProtocol(strings.ToLower(p.GetProtocol().String())))
		ip, _ := netip.ParseAddr(p.GetHostIp())
		b := network.PortBinding{
			HostIP:   ip,
			HostPort: fmt.Sprint(p.GetHostPort()),
		}

		if c.Host.PortBindings == nil {
			c.Host.PortBindings, c.Config.ExposedPorts = network.PortMap{}, network.PortSet{}
		}

		c.Host.PortBindings[port] = append(c.Host.PortBindings[port], b)
		c.Config.ExposedPorts[port] = struct{}{}
	}
}

func setSandboxSecurity(c *Create, sc *runtimeapi.LinuxSandboxSecurityContext, o SandboxOptions) error {
	c.Host.Privileged = sc.GetPrivileged()
	c.Host.ReadonlyRootfs = sc.GetReadonlyRootfs()
	c.Config.User = processUser(sc.GetRunAsUser(), sc.GetRunAsGroup(), "")
	c.Host.GroupAdd = groups(sc.GetSupplementalGroups())
	in := securityInput{
		seccomp:  sandboxSeccomp(sc),
		apparmor: sc.GetApparmor(),
		selinux:  sc.GetSelinuxOptions(),
		profile:  o.SeccompProfile,
	}
	if in.seccomp.GetProfileType() == runtimeapi.SecurityProfile_RuntimeDefault && o.hasPauseProfile() {
		in.seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost}
		in.profile = o.Image.Seccomp
	}

	opts, err := securityOptions(in, o.Host)

	c.Host.SecurityOpt = append(c.Host.SecurityOpt, opts...)

	return err
}

// hasPauseProfile reports whether the pause image's own seccomp profile can replace Docker's
// default profile. Profiles of the operator stay in force, and other OCI runtimes may need more
// system calls than runc.
func (o SandboxOptions) hasPauseProfile() bool {
	isDefault := o.RuntimeHandler == "" || o.RuntimeHandler == o.Host.DefaultRuntime
	return o.Image.Seccomp != "" && o.Host.BuiltinSeccomp && isDefault && o.Host.DefaultRunc
}

// cgroupParent returns a cgroup parent in the engine's form. With the systemd driver it is the name
// of the slice alone.
func cgroupParent(parent string, h model.Host) string {
	if parent != "" && h.CgroupDriver == "systemd" {
		return path.Base(parent)
	}
	return parent
}

// shimGroup returns the annotation for a common runc shim process of containerd for all containers
// of a pod. Engines before API 1.43 have no annotations.
func shimGroup(h model.Host, sandbox string) map[string]string {
	if !h.AtLeast("1.43") {
		return nil
	}
	return map[string]string{labelShimGroupKey: sandbox}
}

// ResolvConf returns the content of a pod's resolv.conf (CRI DNSConfig).
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

// Hosts returns the content of a pod's hosts file: the loopback and multicast names, and the pod's
// name with its addresses.
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
