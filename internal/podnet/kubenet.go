package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// The hairpin modes of --hairpin-mode: how a pod reaches itself through a service.
const (
	HairpinNone    = "none"
	HairpinVeth    = "hairpin-veth"
	HairpinPromisc = "promiscuous-bridge"
)

const (
	kubenetName    = "kubenet"
	kubenetBridge  = "cbr0"
	kubenetVersion = "0.4.0" // the CNI version that plugins of the last eight years all speak
)

// KubenetConfig says how the generated network is to be.
type KubenetConfig struct {
	BinDirs  []string // of the standard plugins
	CacheDir string   // of libcni
	PodCIDRs []netip.Prefix
	MTU      int // bytes; 0 is the plugin's default
	Hairpin  string
	Log      *slog.Logger
}

// Kubenet is a bridge on the node's pod CIDR, made by the standard plugins bridge, host-local and portmap from a generated configuration.
// Pods keep the configuration with which they were connected when the range changes.
type Kubenet struct {
	cfg    KubenetConfig
	attach *attacher

	mu   sync.RWMutex              // guards list
	list *libcni.NetworkConfigList // nil until a pod CIDR is known
}

var _ Network = (*Kubenet)(nil)

// NewKubenet makes the network. Without pod CIDRs it waits for SetPodCIDR.
func NewKubenet(cfg KubenetConfig) (*Kubenet, error) {
	attach, err := newAttacher(cfg.BinDirs, cfg.CacheDir, cfg.Log)
	if err != nil {
		return nil, err
	}
	k := &Kubenet{cfg: cfg, attach: attach}
	return k, k.SetPodCIDR(cfg.PodCIDRs)
}

// SetPodCIDR implements Network. No ranges change nothing.
func (k *Kubenet) SetPodCIDR(cidrs []netip.Prefix) error {
	if len(cidrs) == 0 {
		return nil
	}
	list, err := kubenetList(k.cfg, cidrs)
	if err != nil {
		return fmt.Errorf("kubenet configuration: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.list == nil || string(k.list.Bytes) != string(list.Bytes) {
		k.cfg.Log.Info("kubenet", "podCIDRs", cidrs)
	}
	k.list = list
	return nil
}

func kubenetList(cfg KubenetConfig, cidrs []netip.Prefix) (*libcni.NetworkConfigList, error) {
	var routes []map[string]string
	for _, c := range cidrs {
		dst := "0.0.0.0/0"
		if c.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, map[string]string{"dst": dst})
	}
	bridge := map[string]any{
		"type": "bridge", "bridge": kubenetBridge, "isGateway": true, "ipMasq": true,
		"hairpinMode": cfg.Hairpin == HairpinVeth, "promiscMode": cfg.Hairpin == HairpinPromisc,
		"ipam": map[string]any{"type": "host-local", "ranges": hostLocalRanges(cidrs), "routes": routes},
	}
	if cfg.MTU > 0 {
		bridge["mtu"] = cfg.MTU
	}
	b, err := json.Marshal(map[string]any{
		"cniVersion": kubenetVersion, "name": kubenetName,
		"plugins": []any{bridge, map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true}},
	})
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromBytes(b)
}

var errNoCIDR = errors.New("kubenet waits for the node's pod CIDR: give --pod-cidr, or let the kubelet tell it (spec.podCIDR of the node)")

func (k *Kubenet) config() (*libcni.NetworkConfigList, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.list == nil {
		return nil, errNoCIDR
	}
	return k.list, nil
}

// Add implements Network.
func (k *Kubenet) Add(ctx context.Context, p Pod) ([]netip.Addr, error) {
	list, err := k.config()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return k.attach.add(ctx, list, p, nil)
}

// Confirm implements Network.
func (k *Kubenet) Confirm(id string) error { return k.attach.confirm(id) }

// Del implements Network.
func (k *Kubenet) Del(ctx context.Context, p Pod) error {
	list, _ := k.config() // without one, the cache still knows what to do
	return k.attach.del(ctx, list, p)
}

// Check implements Network.
func (k *Kubenet) Check(ctx context.Context, p Pod) error { return k.attach.check(ctx, p) }

// Collect implements Network.
func (k *Kubenet) Collect(ctx context.Context) error {
	list, err := k.config()
	if err != nil {
		return nil
	}
	return k.attach.collect(ctx, list)
}

// IPs implements Network.
func (k *Kubenet) IPs(id string) []netip.Addr { return k.attach.addressesOf(id) }

// Attached implements Network.
func (k *Kubenet) Attached() []string { return k.attach.attached() }

// Ready implements Network.
func (k *Kubenet) Ready() error {
	list, err := k.config()
	if err != nil {
		return err
	}
	return missing(list, k.cfg.BinDirs)
}

// Mode implements Network.
func (k *Kubenet) Mode() string { return "none" }

// Notice implements Network.
func (k *Kubenet) Notice() string { return "" }

// Run implements Network: nothing is to be followed.
func (k *Kubenet) Run(context.Context) {}

// Close implements Network.
func (k *Kubenet) Close() error { return nil }
