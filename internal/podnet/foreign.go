package podnet

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/libcni"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What shims before this one left in libcni's cache: connections of single plugins beside those of
// lists, without what the plugins were told of host ports, or results alone, from before libcni
// kept configurations (0.8).

// listFromBytes reads a cached configuration: a list, or the single plugin that kubenet once was.
func listFromBytes(b []byte) (*libcni.NetworkConfigList, error) {
	if len(b) > maxConfig {
		return nil, fmt.Errorf("it has %d bytes, at most %d are possible", len(b), maxConfig)
	}

	var keys map[string]json.RawMessage
	if err := json.Unmarshal(b, &keys); err != nil {
		return nil, err
	}

	if _, single := keys["type"]; !single || keys["plugins"] != nil {
		list, err := libcni.NetworkConfFromBytes(b)
		if err != nil {
			return nil, err
		}
		return list, checkList(list)
	}

	return singlePlugin(b)
}

// withPorts adds the host ports to what plugins are told, if they are not told of any.
func withPorts(capabilities map[string]any, ports []*runtimeapi.PortMapping) map[string]any {
	mapped := mappable(ports)
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

// adopt notes that a pod holds a connection that others have made: it must not be taken for a
// leftover of nobody.
func (a *attacher) adopt(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.ips[id]; !known {
		a.ips[id] = nil
	}
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

// ReadCache reads libcni's cache: the connection of each sandbox, by its ID. An older shim's entry
// may be of a result alone, which is not among them.
func ReadCache(cacheDir string) (map[string]Connection, error) {
	cached, err := (&cache{dir: cacheDir}).entries("")
	if err != nil {
		return nil, err
	}

	out := map[string]Connection{}
	for _, e := range cached {
		if e.IfName != ifName {
			continue
		}

		conn := Connection{
			Network:   e.Network,
			Addresses: e.addresses(),
			Ports:     toldPorts(e.Capabilities),
		}
		if e.list == nil {
			_, err := listFromBytes(e.Config)
			conn.Problem = fmt.Sprintf("the cached configuration of network %s: %v", e.Network, boundError(err))
			out[e.ContainerID] = conn
			continue
		}

		for _, p := range e.list.Plugins {
			conn.Plugins = append(conn.Plugins, p.Network.Type)
			conn.MapsPorts = conn.MapsPorts || p.Network.Capabilities["portMappings"]
		}

		out[e.ContainerID] = conn
	}

	return out, nil
}

// toldPorts are the host ports in cached capability arguments, as far as they are ports.
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
		p := &runtimeapi.PortMapping{
			Protocol:      runtimeapi.Protocol(runtimeapi.Protocol_value[strings.ToUpper(m.Protocol)]),
			ContainerPort: m.ContainerPort,
			HostPort:      m.HostPort,
			HostIp:        m.HostIP,
		}
		if checkPort(p) == nil {
			out = append(out, p)
		}
	}

	return out
}
