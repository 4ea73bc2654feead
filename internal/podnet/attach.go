package podnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/undo"
)

const (
	ifName       = "eth0"
	opDeadline   = 2 * time.Minute // for one ADD or DEL with all its plugins
	undoDeadline = 30 * time.Second
)

// attacher runs the plugins of a configuration for pods, and remembers what they gave. libcni's cache is where that is kept; memory is a
// copy of it.
type attacher struct {
	cni *libcni.CNIConfig

	mu  sync.RWMutex            // guards ips
	ips map[string][]netip.Addr // by sandbox ID; an entry for every pod that is attached
}

// newAttacher reads what earlier processes attached.
func newAttacher(binDirs []string, cacheDir string) (*attacher, error) {
	// libcni makes an exec when it is given none, but at the first use and unguarded, and pods are attached side by side.
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}, PluginDecoder: version.PluginDecoder{}}
	a := &attacher{cni: libcni.NewCNIConfigWithCacheDir(binDirs, cacheDir, exec), ips: map[string][]netip.Addr{}}
	cached, err := a.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("read the CNI cache %s: %w", cacheDir, err)
	}
	for _, c := range cached {
		if c.IfName != ifName {
			continue
		}
		a.ips[c.ContainerID] = nil
		list, err := libcni.ConfListFromBytes(c.Config)
		if err != nil {
			continue
		}
		if r, err := a.cni.GetNetworkListCachedResult(list, runtimeOf(c)); err == nil && r != nil {
			a.ips[c.ContainerID], _ = addresses(r)
		}
	}
	return a, nil
}

func runtimeOf(c *libcni.NetworkAttachment) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: c.ContainerID, NetNS: c.NetNS, IfName: c.IfName, Args: c.CniArgs, CapabilityArgs: c.CapabilityArgs}
}

// add connects a pod with a configuration. On error nothing is left.
func (a *attacher) add(ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix) (_ []netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(ctx, opDeadline)
	defer cancel()
	if err := loopbackUp(p.NetNS); err != nil {
		return nil, fmt.Errorf("bring up lo of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	rt := runtimeConf(p, ranges)
	var u undo.Stack
	u.Push("CNI ADD", func(ctx context.Context) error { return a.remove(ctx, list, rt) })
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx, undoDeadline))
		}
	}()
	result, err := a.cni.AddNetworkList(ctx, list, rt)
	if err != nil {
		return nil, fmt.Errorf("connect pod %s/%s to network %s: %w", p.Namespace, p.Name, list.Name, err)
	}
	ips, err := addresses(result)
	if err != nil {
		return nil, fmt.Errorf("connect pod %s/%s to network %s: %w", p.Namespace, p.Name, list.Name, err)
	}
	a.mu.Lock()
	a.ips[p.ID] = ips
	a.mu.Unlock()
	return ips, nil
}

// del disconnects a pod with the configurations with which it was connected. A pod of which the cache knows nothing, but whose namespace
// is still there, may have been left in the middle of an ADD: it is disconnected with the current configuration, if there is one.
func (a *attacher) del(ctx context.Context, current *libcni.NetworkConfigList, p Pod) error {
	ctx, cancel := context.WithTimeout(ctx, opDeadline)
	defer cancel()
	cached, err := a.cni.GetCachedAttachments(p.ID)
	if err != nil {
		return fmt.Errorf("disconnect pod %s/%s: read the CNI cache: %w", p.Namespace, p.Name, err)
	}
	var errs []error
	for _, c := range cached {
		list, err := libcni.ConfListFromBytes(c.Config)
		if err == nil {
			rt := runtimeOf(c)
			rt.NetNS = p.NetNS
			err = a.remove(ctx, list, rt)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("disconnect pod %s/%s from network %s: %w", p.Namespace, p.Name, c.Network, err))
		}
	}
	if len(cached) == 0 && p.NetNS != "" && current != nil {
		errs = append(errs, a.remove(ctx, current, runtimeConf(p, nil)))
	}
	return errors.Join(errs...)
}

func (a *attacher) remove(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
	if err := a.cni.DelNetworkList(ctx, list, rt); err != nil {
		return err
	}
	a.mu.Lock()
	delete(a.ips, rt.ContainerID)
	a.mu.Unlock()
	return nil
}

// addressesOf are a pod's addresses.
func (a *attacher) addressesOf(id string) []netip.Addr {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.ips[id]
}

// attached are the sandboxes that hold a connection.
func (a *attacher) attached() []string {
	a.mu.RLock()
	defer a.mu.RUnlock()
	ids := make([]string, 0, len(a.ips))
	for id := range a.ips {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// addresses are a result's addresses on the pod's interface, in the plugins' order.
func addresses(result types.Result) ([]netip.Addr, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("the plugins' result: %w", err)
	}
	var ips []netip.Addr
	for _, ip := range r.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			ips = append(ips, a.Unmap())
		}
	}
	if len(ips) == 0 {
		return nil, errors.New("the plugins gave no address")
	}
	return ips, nil
}

// runtimeConf is what the plugins are told of a pod (CNI specification, sections 2 and "Dynamic plugin-specific fields").
func runtimeConf(p Pod, ranges []netip.Prefix) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID: p.ID, NetNS: p.NetNS, IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name}, {"K8S_POD_INFRA_CONTAINER_ID", p.ID}, {"K8S_POD_UID", p.UID},
		},
		CapabilityArgs: map[string]any{},
	}
	if ports := portMappings(p.Ports); len(ports) > 0 {
		rt.CapabilityArgs["portMappings"] = ports
	}
	if b := bandwidth(p.Annotations); len(b) > 0 {
		rt.CapabilityArgs["bandwidth"] = b
	}
	if d := p.DNS; len(d.GetServers())+len(d.GetSearches())+len(d.GetOptions()) > 0 {
		rt.CapabilityArgs["dns"] = map[string]any{"servers": d.GetServers(), "searches": d.GetSearches(), "options": d.GetOptions()}
	}
	if len(ranges) > 0 {
		rt.CapabilityArgs["ipRanges"] = hostLocalRanges(ranges)
	}
	return rt
}

// portMapping is an element of the capability portMappings.
type portMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

func portMappings(ports []*runtimeapi.PortMapping) []portMapping {
	var out []portMapping
	for _, p := range ports {
		if p.GetHostPort() > 0 {
			out = append(out, portMapping{p.GetHostPort(), p.GetContainerPort(), strings.ToLower(p.GetProtocol().String()), p.GetHostIp()})
		}
	}
	return out
}

// hostLocalRanges are ranges in the form of host-local's "ranges" and the capability ipRanges: one set for each family.
func hostLocalRanges(prefixes []netip.Prefix) [][]map[string]string {
	var out [][]map[string]string
	for _, p := range prefixes {
		out = append(out, []map[string]string{{"subnet": p.String()}})
	}
	return out
}
