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

// Capabilities of containerd in addition to the CNI conventions.
const (
	annotationsCapability = "io.kubernetes.cri.pod-annotations"
	cgroupCapability      = "cgroupPath"
)

// maxAnnotations bounds a pod's annotations for plugins, in bytes of JSON. Kubernetes allows 256
// KiB, and JSON may encode a byte as six.
const maxAnnotations = 6 * 256 << 10

// runtimeConf returns the parameters of plugins for a pod (CNI specification, section 2 and
// "Dynamic plugin-specific fields"). It returns InvalidArgument for values unsafe for plugins.
func runtimeConf(list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix) (*libcni.RuntimeConf, error) {
	limits, err := bandwidth(p.Annotations)
	if err = errors.Join(checkPod(p), err); err != nil {
		return nil, fmt.Errorf("network of pod %s: %w: %w", p.title(), err, errdefs.ErrInvalidArgument)
	}

	rt := &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS,
		IfName:         ifName,
		Args:           podArgs(p),
		CapabilityArgs: map[string]any{},
	}
	if ports := portMappings(p.Ports); len(ports) > 0 {
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
	// These values are large or private, so only configurations with the capability store them in
	// their cache.
	if len(p.Annotations) > 0 && hasCapability(list, annotationsCapability) {
		rt.CapabilityArgs[annotationsCapability] = p.Annotations
	}
	if p.CgroupParent != "" && hasCapability(list, cgroupCapability) {
		rt.CapabilityArgs[cgroupCapability] = p.CgroupParent
	}

	return rt, nil
}

// checkPod checks that all values of a pod are safe for plugins.
func checkPod(p Pod) error {
	var errs []error
	for _, a := range podArgs(p) {
		if !isArg(a[1]) {
			errs = append(errs, fmt.Errorf("%s: %q cannot be an argument of CNI plugins", a[0], excerpt([]byte(a[1]))))
		}
	}

	for i, m := range p.Ports {
		if m.GetHostPort() != 0 {
			if err := checkPort(m); err != nil {
				errs = append(errs, fmt.Errorf("config.port_mappings[%d].%w", i, err))
			}
		}
	}

	if b, err := json.Marshal(p.Annotations); err != nil || len(b) > maxAnnotations {
		errs = append(errs, fmt.Errorf("config.annotations: %d bytes exceed the limit of %d for plugins", len(b),
			maxAnnotations))
	}

	return errors.Join(errs...)
}

// hasCapability reports whether one of the plugins has a capability.
func hasCapability(list *libcni.NetworkConfigList, name string) bool {
	return slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[name] })
}

// releaseConf returns the parameters for a DEL without a recorded attachment. It omits unsafe
// values, since the pod must be released anyway.
func releaseConf(p Pod) *libcni.RuntimeConf {
	args := slices.DeleteFunc(podArgs(p), func(a [2]string) bool { return !isArg(a[1]) })
	rt := &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS,
		IfName:         ifName,
		Args:           args,
		CapabilityArgs: map[string]any{},
	}
	if ports := portMappings(p.Ports); len(ports) > 0 {
		rt.CapabilityArgs["portMappings"] = ports
	}

	return rt
}

// podArgs returns the CNI_ARGS of a pod, with the names common to Kubernetes' runtimes.
func podArgs(p Pod) [][2]string {
	return [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
}

// maxArg limits a value of CNI_ARGS in bytes. Kubernetes' names have at most 253.
const maxArg = 1 << 10

// isArg reports whether a value of CNI_ARGS has only letters, digits, '.', '-' and '_'. Such a
// value can be neither a second argument (KEY=VALUE;KEY=VALUE) nor a command-line option.
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

// checkPort checks the ports, the protocol and the address of a mapping, because plugins pass them
// to iptables. The error begins with the field's name.
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
			return fmt.Errorf("host_ip: %q is not an IP address", excerpt([]byte(s)))
		}
	}

	return nil
}

// portMappings converts the valid host ports of a pod for plugins.
func portMappings(ports []*runtimeapi.PortMapping) []portMapping {
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

// hostLocalRanges converts prefixes to host-local's "ranges" and the capability ipRanges: one set
// for each family.
func hostLocalRanges(prefixes []netip.Prefix) [][]map[string]string {
	var out [][]map[string]string
	for _, p := range prefixes {
		out = append(out, []map[string]string{{"subnet": p.String()}})
	}
	return out
}
