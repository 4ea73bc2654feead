package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// Values of --hairpin-mode: how a pod reaches itself through a service.
const (
	HairpinNone    = "none"
	HairpinVeth    = "hairpin-veth"
	HairpinPromisc = "promiscuous-bridge"
)

const (
	kubenetName    = "kubenet"
	kubenetBridges = "cbr"   // cbr0 and, after a change of the range, cbr1, …
	kubenetVersion = "0.4.0" // supported by all plugins of the last eight years
)

// KubenetConfig configures a kubenet network.
type KubenetConfig struct {
	BinDirs  []string // of the standard plugins
	CacheDir string   // of libcni
	Pins     *Pins    // return the addresses of pods with a damaged cache entry; nil for none
	PodCIDRs []netip.Prefix
	MTU      int // bytes; 0 is the plugin's default
	Hairpin  string
	Observer *Observer // nil for none
	Log      *slog.Logger
}

// Kubenet is a bridge on the node's pod CIDR. The standard plugins bridge, host-local and portmap
// create it from a generated configuration. When the range changes, existing pods keep their
// configuration.
type Kubenet struct {
	cfg    KubenetConfig
	attach *attacher

	mu   sync.RWMutex              // guards list
	list *libcni.NetworkConfigList // nil until a pod CIDR is known
}

var _ Network = (*Kubenet)(nil)

// KubenetPlugins returns the programs required by kubenet.
func KubenetPlugins() []string { return []string{"bridge", "host-local", "portmap"} }

// NewKubenet creates the network. Without pod CIDRs it waits for SetPodCIDR.
func NewKubenet(cfg KubenetConfig) (*Kubenet, error) {
	attach, err := newAttacher(cfg.BinDirs, cfg.CacheDir, cfg.Pins, cfg.Observer, cfg.Log)
	if err != nil {
		return nil, err
	}
	k := &Kubenet{cfg: cfg, attach: attach}
	return k, k.SetPodCIDR(cfg.PodCIDRs)
}

// SetPodCIDR implements Network. An empty list changes nothing.
func (k *Kubenet) SetPodCIDR(cidrs []netip.Prefix) error {
	if len(cidrs) == 0 {
		return nil
	}

	bridge, err := bridgeFor(cidrs, bridgeAddresses)
	if err != nil {
		return err
	}

	list, err := kubenetList(k.cfg, cidrs, bridge)
	if err != nil {
		return fmt.Errorf("kubenet configuration: %w", err)
	}

	k.mu.Lock()
	defer k.mu.Unlock()

	if k.list == nil || string(k.list.Bytes) != string(list.Bytes) {
		k.cfg.Log.Info("using kubenet configuration", "podCIDRs", cidrs, "bridge", bridge)
	}

	k.list = list

	return nil
}

// bridgeFor returns the first bridge without addresses outside these ranges, or a new one. A bridge
// of an earlier range stays unchanged, because it is the gateway of running pods.
func bridgeFor(cidrs []netip.Prefix, addresses func(bridge string) ([]netip.Addr, error)) (string, error) {
	for i := range maxBridges {
		name := kubenetBridges + strconv.Itoa(i)
		all, err := addresses(name)
		if err != nil {
			return "", fmt.Errorf("kubenet: addresses of %s: %w", name, err)
		}

		within := func(a netip.Addr) bool {
			return a.IsLinkLocalUnicast() || slices.ContainsFunc(cidrs, func(c netip.Prefix) bool {
				return c.Contains(a)
			})
		}
		if !slices.ContainsFunc(all, func(a netip.Addr) bool { return !within(a) }) {
			return name, nil
		}
	}

	return "", fmt.Errorf("kubenet: bridges %s0 to %s%d have addresses outside the pod CIDR; remove an unused bridge "+
		"(ip link del %s0)", kubenetBridges, kubenetBridges, maxBridges-1, kubenetBridges)
}

const maxBridges = 16

// bridgeAddresses returns the addresses of an interface, none if it does not exist.
func bridgeAddresses(name string) ([]netip.Addr, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, nil //nolint:nilerr // it is not there
	}

	all, err := i.Addrs()
	var out []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}

	return out, err
}

func kubenetList(cfg KubenetConfig, cidrs []netip.Prefix, name string) (*libcni.NetworkConfigList, error) {
	var routes []map[string]string
	for _, c := range cidrs {
		dst := "0.0.0.0/0"
		if c.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, map[string]string{"dst": dst})
	}

	// On newer kernels, frames passed up by a promiscuous bridge lose their address translation if
	// they traverse iptables.
	promiscuous := cfg.Hairpin == HairpinPromisc && !framesPassIptables()
	bridge := map[string]any{
		"type": "bridge", "bridge": name, "isGateway": true, "ipMasq": true,
		"hairpinMode": cfg.Hairpin != HairpinNone && !promiscuous, "promiscMode": promiscuous,
		"ipam": map[string]any{"type": "host-local", "ranges": hostLocalRanges(cidrs), "routes": routes},
	}
	if cfg.MTU > 0 {
		bridge["mtu"] = cfg.MTU
	}

	b, err := json.Marshal(map[string]any{
		"cniVersion": kubenetVersion, "name": kubenetName,
		"plugins": []any{bridge, map[string]any{
			"type":         "portmap",
			"capabilities": map[string]bool{"portMappings": true},
			"snat":         true,
		}},
	})
	if err != nil {
		return nil, err
	}

	return libcni.ConfListFromBytes(b)
}

// framesPassIptables reports whether bridged frames traverse iptables (br_netfilter, as on cluster
// nodes).
func framesPassIptables() bool {
	b, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-iptables")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

var errNoCIDR = errors.New("kubenet is waiting for the node's pod CIDR: set --pod-cidr, or assign spec.podCIDR of " +
	"the node")

func (k *Kubenet) config() (*libcni.NetworkConfigList, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.list == nil {
		return nil, errNoCIDR
	}
	return k.list, nil
}

// Add implements Connector.
func (k *Kubenet) Add(ctx context.Context, p Pod) ([]netip.Addr, error) {
	list, err := k.config()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return k.attach.add(ctx, list, p, nil)
}

// Confirm implements Connector.
func (k *Kubenet) Confirm(id string) error { return k.attach.confirm(id) }

// Del implements Connector.
func (k *Kubenet) Del(ctx context.Context, p Pod) error {
	list, _ := k.config() // without a configuration, the cache still has the one of the ADD
	return k.attach.del(ctx, list, p)
}

// Check implements Connector.
func (k *Kubenet) Check(ctx context.Context, p Pod) error { return k.attach.check(ctx, p) }

// Collect implements Connector.
func (k *Kubenet) Collect(ctx context.Context) error {
	list, err := k.config()
	if err != nil {
		return nil
	}
	return k.attach.collect(ctx, list)
}

// Adopt implements Connector.
func (k *Kubenet) Adopt(id string) { k.attach.adopt(id) }

// IPs implements Connector.
func (k *Kubenet) IPs(id string) []netip.Addr { return k.attach.addressesOf(id) }

// Attached implements Connector.
func (k *Kubenet) Attached() []string { return k.attach.attached() }

// Ready implements Network.
func (k *Kubenet) Ready() error {
	list, err := k.config()
	if err != nil {
		return err
	}
	return checkInstalled(list, k.cfg.BinDirs)
}

// Connector implements Network.
func (k *Kubenet) Connector() Connector { return k }

// Notice implements Network.
func (k *Kubenet) Notice() string { return k.attach.cache.notice() }

// Run implements Network. Reinstalled plugins release their resources of removed pods.
func (k *Kubenet) Run(ctx context.Context) { k.attach.run(ctx) }

// Close implements Network.
func (k *Kubenet) Close() error { return nil }
