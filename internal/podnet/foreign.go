package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/libcni"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What shims before this one left in libcni's cache: connections of single plugins beside those of lists, without what the plugins were told
// of host ports, or results alone, from before libcni kept configurations (0.8).

// listFromBytes reads a cached configuration: a list, or the single plugin that kubenet once was.
func listFromBytes(b []byte) (*libcni.NetworkConfigList, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(b, &keys); err != nil {
		return nil, err
	}
	if _, single := keys["type"]; !single || keys["plugins"] != nil {
		list, err := libcni.ConfListFromBytes(b)
		if err == nil && len(list.Plugins) == 0 {
			err = errors.New("it has no plugins")
		}
		return list, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromConf(conf)
}

// withPorts adds the host ports to what plugins are told, if they are not told of any.
func withPorts(capabilities map[string]any, ports []*runtimeapi.PortMapping) map[string]any {
	mapped := portMappings(ports)
	if len(mapped) == 0 || capabilities["portMappings"] != nil {
		return capabilities
	}
	out := maps.Clone(capabilities)
	if out == nil {
		out = map[string]any{}
	}
	out["portMappings"] = mapped
	return out
}

// adopt notes that a pod holds a connection that others have made: it must not be taken for a leftover of nobody.
func (a *attacher) adopt(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.ips[id]; !known {
		a.ips[id] = nil
	}
}

// Addresses are the addresses of a pod's interface as its network namespace has them, IPv4 first; nil if there are none.
func Addresses(netns string) []netip.Addr {
	var all []net.Addr
	err := inNetNS(netns, func() error {
		eth, err := net.InterfaceByName(ifName)
		if err == nil {
			all, err = eth.Addrs()
		}
		return err
	})
	if err != nil {
		return nil
	}
	var ips []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
			ips = append(ips, p.Addr().Unmap())
		}
	}
	return ips
}

// Connection is how libcni's cache says that a pod is connected.
type Connection struct {
	Network   string
	Plugins   []string // their types
	Addresses []netip.Addr
	Ports     []*runtimeapi.PortMapping // what the plugins were told
	MapsPorts bool                      // one of the plugins maps host ports, and unmaps them
	Problem   string                    // why a DEL with this entry cannot work, "" if it can
}

// ReadCache reads libcni's cache: the connection of each sandbox, by its ID. An older shim's entry may be of a result alone, which is not
// among them.
func ReadCache(cacheDir string) (map[string]Connection, error) {
	cni := libcni.NewCNIConfigWithCacheDir(nil, cacheDir, nil)
	cached, err := cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("read the CNI cache %s: %w", cacheDir, err)
	}
	out := map[string]Connection{}
	for _, c := range cached {
		if c.IfName != ifName {
			continue
		}
		conn := Connection{Network: c.Network, Ports: toldPorts(c.CapabilityArgs)}
		list, err := listFromBytes(c.Config)
		if err != nil {
			conn.Problem = fmt.Sprintf("the cached configuration of network %s: %v", c.Network, err)
			out[c.ContainerID] = conn
			continue
		}
		for _, p := range list.Plugins {
			conn.Plugins = append(conn.Plugins, p.Network.Type)
			conn.MapsPorts = conn.MapsPorts || p.Network.Capabilities["portMappings"]
		}
		if r, err := cni.GetNetworkListCachedResult(list, runtimeOf(c)); err == nil && r != nil {
			conn.Addresses, _ = addresses(r)
		}
		out[c.ContainerID] = conn
	}
	return out, nil
}

// toldPorts are the host ports in cached capability arguments.
func toldPorts(capabilities map[string]any) []*runtimeapi.PortMapping {
	b, err := json.Marshal(capabilities["portMappings"])
	if err != nil {
		return nil
	}
	var mapped []portMapping
	if json.Unmarshal(b, &mapped) != nil {
		return nil
	}
	var out []*runtimeapi.PortMapping
	for _, m := range mapped {
		out = append(out, &runtimeapi.PortMapping{
			Protocol: runtimeapi.Protocol(runtimeapi.Protocol_value[strings.ToUpper(m.Protocol)]), ContainerPort: m.ContainerPort, HostPort: m.HostPort, HostIp: m.HostIP,
		})
	}
	return out
}
