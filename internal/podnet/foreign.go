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

// Older shims wrote other entries to libcni's cache: connections of single plugins, without the
// capability arguments for host ports, or bare results from before libcni cached configurations
// (0.8).

// listFromBytes parses a cached configuration: a list, or a single plugin of an old kubenet.
func listFromBytes(b []byte) (*libcni.NetworkConfigList, error) {
	if len(b) > maxConfig {
		return nil, fmt.Errorf("%d bytes exceed the limit of %d", len(b), maxConfig)
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

// withPorts adds the host ports to the capabilities, unless these have ports.
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

// adopt records the connection of an older shim's pod, so that GC does not release it.
func (a *attacher) adopt(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.ips[id]; !known {
		a.ips[id] = nil
	}
}

// Connection describes a pod's connection according to libcni's cache.
type Connection struct {
	Network   string
	Plugins   []string // their types
	Addresses []netip.Addr
	Ports     []*runtimeapi.PortMapping // host ports passed to the plugins
	MapsPorts bool                      // one of the plugins maps and unmaps host ports
	Problem   string                    // why a DEL with this entry would fail, "" if it would not
}

// ReadCache reads libcni's cache and returns the connection of each sandbox by ID. It omits bare
// results of older shims.
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
			Ports:     cachedPorts(e.Capabilities),
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

// cachedPorts returns the valid host ports in cached capability arguments.
func cachedPorts(capabilities map[string]any) []*runtimeapi.PortMapping {
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
