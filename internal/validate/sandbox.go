package validate

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// sandbox checks the configuration of a new sandbox.
func (p *problems) sandbox(field string, c *runtimeapi.PodSandboxConfig) {
	p.pod(field, c)

	sc := c.GetLinux().GetSecurityContext()
	if sc.GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE {
		p.hostNetwork(field, c)
	} else {
		p.hostIPs(field, c.GetPortMappings())
	}

	p.user(field+".linux.security_context", securityContext{
		user:   sc.GetRunAsUser(),
		group:  sc.GetRunAsGroup(),
		policy: sc.GetSupplementalGroupsPolicy(),
		groups: sc.GetSupplementalGroups(),
	})
}

// hostNetwork checks a pod on the host network. Its network sysctls would change the node.
func (p *problems) hostNetwork(field string, c *runtimeapi.PodSandboxConfig) {
	for _, name := range slices.Sorted(maps.Keys(c.GetLinux().GetSysctls())) {
		if model.IsNetSysctl(name) {
			p.add(field+".linux.sysctls["+name+"]", "a pod on the host network cannot set it")
		}
	}
}

// hostIPs checks the addresses of host ports.
func (p *problems) hostIPs(field string, ports []*runtimeapi.PortMapping) {
	for i, m := range ports {
		if m.GetHostPort() <= 0 || m.GetHostIp() == "" {
			continue
		}
		if a, err := netip.ParseAddr(m.GetHostIp()); err != nil || a.Zone() != "" {
			p.add(fmt.Sprintf("%s.port_mappings[%d].host_ip", field, i), "%q is not an IP address", m.GetHostIp())
		}
	}
}

// pod checks a sandbox configuration, of a new sandbox or of the sandbox of a new container.
func (p *problems) pod(field string, c *runtimeapi.PodSandboxConfig) {
	if c.GetMetadata() == nil {
		p.add(field+".metadata", "must be set")
		return
	}

	p.name(field+".metadata.name", c.GetMetadata().GetName())
	p.name(field+".metadata.namespace", c.GetMetadata().GetNamespace())
	p.name(field+".metadata.uid", c.GetMetadata().GetUid())
	p.hostname(field+".hostname", c.GetHostname())
	if c.GetLogDirectory() != "" {
		p.absolutePath(field+".log_directory", c.GetLogDirectory())
	}

	p.portMappings(field+".port_mappings", c.GetPortMappings())
	p.textMap(field+".labels", c.GetLabels())
	p.textMap(field+".annotations", c.GetAnnotations())
	p.textMap(field+".linux.sysctls", c.GetLinux().GetSysctls())
	p.resources(field+".linux.overhead", c.GetLinux().GetOverhead())
	p.resources(field+".linux.resources", c.GetLinux().GetResources())
	p.words(field+".dns_config.servers", c.GetDnsConfig().GetServers())
	p.words(field+".dns_config.searches", c.GetDnsConfig().GetSearches())
	p.words(field+".dns_config.options", c.GetDnsConfig().GetOptions())
	if c.GetWindows() != nil {
		p.add(field+".windows", "this node runs Linux")
	}

	p.podSecurity(field+".linux.security_context", c.GetLinux().GetSecurityContext())
	if parent := c.GetLinux().GetCgroupParent(); parent != "" {
		p.text(field+".linux.cgroup_parent", parent)
		if hasDotDot(parent) {
			p.add(field+".linux.cgroup_parent", "%q must not contain '..'", parent)
		}
	}
}

func (p *problems) hostname(field, s string) {
	if len(s) > maxHostname {
		p.add(field, "has %d characters, the maximum is %d", len(s), maxHostname)
	}
	if s != "" && !namePattern.MatchString(s) {
		p.add(field, "%q is not a host name", s)
	}
}

func (p *problems) portMappings(field string, ports []*runtimeapi.PortMapping) {
	for i, m := range ports {
		f := fmt.Sprintf("%s[%d]", field, i)
		enum(p, f+".protocol", runtimeapi.Protocol_name, m.GetProtocol())
		if m.GetHostPort() < 0 || m.GetHostPort() > 65535 {
			p.add(f+".host_port", "%d is not a port", m.GetHostPort())
		}
		if m.GetHostPort() > 0 {
			p.port(f+".container_port", m.GetContainerPort())
		}
	}
}

// words requires words that fit into a line of resolv.conf.
func (p *problems) words(field string, list []string) {
	for i, s := range list {
		f := fmt.Sprintf("%s[%d]", field, i)
		p.required(f, s)
		if strings.ContainsAny(s, "\n\r") {
			p.add(f, "contains a line break")
		}
	}
}

func (p *problems) podSecurity(field string, sc *runtimeapi.LinuxSandboxSecurityContext) {
	p.namespaces(field+".namespace_options", sc.GetNamespaceOptions())
	if sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_TARGET {
		p.add(field+".namespace_options.pid", "TARGET is for containers")
	}

	p.profile(field+".seccomp", sc.GetSeccomp())
	p.profileString(field+".seccomp_profile_path", sc.GetSeccompProfilePath()) //nolint:staticcheck // old kubelets
	p.profile(field+".apparmor", sc.GetApparmor())
	p.appArmorName(field+".apparmor", sc.GetApparmor())
}
