package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Capabilities that containerd gives to plugins beyond those of the CNI conventions.
const (
	annotationsCapability = "io.kubernetes.cri.pod-annotations"
	cgroupCapability      = "cgroupPath"
)

// maxAnnotations bounds a pod's annotations as plugins get them, in bytes of JSON. Kubernetes
// permits 256 KiB, each byte of which may take six.
const maxAnnotations = 6 * 256 << 10

// runtimeConf is what the plugins of a configuration get to know of a pod (CNI specification,
// sections 2 and "Dynamic plugin-specific fields"). What the pod's author wrote and no plugin may
// see is InvalidArgument.
func runtimeConf(list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix) (*libcni.RuntimeConf, error) {
	var errs []error
	args := podArgs(p)
	for _, a := range args {
		if !isArg(a[1]) {
			errs = append(errs, fmt.Errorf("%s: %q cannot be an argument of CNI plugins", a[0], shown([]byte(a[1]))))
		}
	}

	for i, m := range p.Ports {
		if m.GetHostPort() != 0 {
			if err := checkPort(m); err != nil {
				errs = append(errs, fmt.Errorf("config.port_mappings[%d].%w", i, err))
			}
		}
	}

	limits, err := bandwidth(p.Annotations)
	if b, jsonErr := json.Marshal(p.Annotations); jsonErr != nil || len(b) > maxAnnotations {
		errs = append(errs, fmt.Errorf("config.annotations: %d bytes, plugins can get at most %d", len(b),
			maxAnnotations))
	}

	if err = errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("network of pod %s: %w: %w", p.title(), err, errdefs.ErrInvalidArgument)
	}

	rt := &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS,
		IfName:         ifName,
		Args:           args,
		CapabilityArgs: map[string]any{},
	}
	if ports := mappable(p.Ports); len(ports) > 0 {
		rt.CapabilityArgs["portMappings"] = ports
	}
	if len(limits) > 0 {
		rt.CapabilityArgs["bandwidth"] = limits
	}

	if d := p.DNS; len(d.GetServers())+len(d.GetSearches())+len(d.GetOptions()) > 0 {
		rt.CapabilityArgs["dns"] = map[string]any{
			"servers":  d.GetServers(),
			"searches": d.GetSearches(),
			"options":  d.GetOptions(),
		}
	}

	if len(ranges) > 0 {
		rt.CapabilityArgs["ipRanges"] = hostLocalRanges(ranges)
	}
	// These are large or private, so only configurations that ask for them have them in their
	// cache.
	if len(p.Annotations) > 0 && hasCapability(list, annotationsCapability) {
		rt.CapabilityArgs[annotationsCapability] = p.Annotations
	}
	if p.CgroupParent != "" && hasCapability(list, cgroupCapability) {
		rt.CapabilityArgs[cgroupCapability] = p.CgroupParent
	}

	return rt, nil
}

// hasCapability says whether one of the plugins asks for a capability.
func hasCapability(list *libcni.NetworkConfigList, name string) bool {
	return slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[name] })
}

// releaseConf is what the plugins get to know of a pod whose attachment nobody remembers. What they
// may not see is left out, since the pod is to be released all the same.
func releaseConf(p Pod) *libcni.RuntimeConf {
	args := slices.DeleteFunc(podArgs(p), func(a [2]string) bool { return !isArg(a[1]) })
	rt := &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS,
		IfName:         ifName,
		Args:           args,
		CapabilityArgs: map[string]any{},
	}
	if ports := mappable(p.Ports); len(ports) > 0 {
		rt.CapabilityArgs["portMappings"] = ports
	}

	return rt
}

// podArgs are the CNI_ARGS of a pod, by the names that Kubernetes' runtimes have agreed on.
func podArgs(p Pod) [][2]string {
	return [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
}

// maxArg bounds a value of CNI_ARGS in bytes; Kubernetes' names have at most 253.
const maxArg = 1 << 10

// isArg says whether a value of CNI_ARGS is of letters, digits, '.', '-' and '_' only, so that it
// can be neither another argument (KEY=VALUE;KEY=VALUE) nor one of a command line.
func isArg(s string) bool {
	for i, c := range []byte(s) {
		isAlnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !isAlnum && (i == 0 || c != '.' && c != '-' && c != '_') {
			return false
		}
	}
	return len(s) <= maxArg
}

// portMapping is an element of the capability portMappings.
type portMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// checkPort wants ports, a protocol and an address, which plugins give to iptables. The error
// begins with the field's name.
func checkPort(p *runtimeapi.PortMapping) error {
	const maxPort = 1<<16 - 1
	if n := p.GetHostPort(); n < 1 || n > maxPort {
		return fmt.Errorf("host_port: %d is not a port", n)
	}
	if n := p.GetContainerPort(); n < 1 || n > maxPort {
		return fmt.Errorf("container_port: %d is not a port", n)
	}
	if _, known := runtimeapi.Protocol_name[int32(p.GetProtocol())]; !known {
		return fmt.Errorf("protocol: %d is not a protocol", p.GetProtocol())
	}

	if s := p.GetHostIp(); s != "" {
		if a, err := netip.ParseAddr(s); err != nil || a.Zone() != "" {
			return fmt.Errorf("host_ip: %q is not an IP address", shown([]byte(s)))
		}
	}

	return nil
}

// mappable are the valid host ports of a pod as plugins get them.
func mappable(ports []*runtimeapi.PortMapping) []portMapping {
	var out []portMapping
	for _, p := range ports {
		if checkPort(p) != nil {
			continue
		}

		m := portMapping{
			HostPort:      p.GetHostPort(),
			ContainerPort: p.GetContainerPort(),
			Protocol:      strings.ToLower(p.GetProtocol().String()),
		}
		if a, err := netip.ParseAddr(p.GetHostIp()); err == nil {
			m.HostIP = a.String()
		}

		out = append(out, m)
	}

	return out
}

// hostLocalRanges are ranges in the form of host-local's "ranges" and the capability ipRanges: one
// set for each family.
func hostLocalRanges(prefixes []netip.Prefix) [][]map[string]string {
	var out [][]map[string]string
	for _, p := range prefixes {
		out = append(out, []map[string]string{{"subnet": p.String()}})
	}
	return out
}
