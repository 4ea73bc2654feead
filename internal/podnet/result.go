package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"cri-dockerd/internal/text"
)

// Limits of a result. Plugin chains on real clusters stay below a tenth of each.
const (
	maxInterfaces = 128
	maxIPs        = 64
	maxRoutes     = 1024
	maxDNSEntries = 64
	maxResultText = 1 << 10 // bytes of one name or path
)

// result is a plugin's output after an ADD (CNI specification, section 5, "Success"), in any
// version of the specification. parseResult checks every field, because libcni trusts plugins.
type result struct {
	CNIVersion string      `json:"cniVersion,omitempty"`
	Interfaces []iface     `json:"interfaces,omitempty"`
	IPs        []ipConfig  `json:"ips,omitempty"`
	Routes     []route     `json:"routes,omitempty"`
	DNS        *types.DNS  `json:"dns,omitempty"`
	IP4        *ipConfig02 `json:"ip4,omitempty"` // versions 0.1 and 0.2
	IP6        *ipConfig02 `json:"ip6,omitempty"`
}

type iface struct {
	Name       string `json:"name"`
	Mac        string `json:"mac,omitempty"`
	MTU        int    `json:"mtu,omitempty"`
	Sandbox    string `json:"sandbox,omitempty"` // path of the network namespace; "" is the host's
	SocketPath string `json:"socketPath,omitempty"`
	PciID      string `json:"pciID,omitempty"`
}

type ipConfig struct {
	Version   string        `json:"version,omitempty"` // before 1.0
	Interface *int          `json:"interface,omitempty"`
	Address   *netip.Prefix `json:"address"`
	Gateway   *netip.Addr   `json:"gateway,omitempty"`
}

type ipConfig02 struct {
	IP      *netip.Prefix `json:"ip"`
	Gateway *netip.Addr   `json:"gateway,omitempty"`
	Routes  []route       `json:"routes,omitempty"`
}

type route struct {
	Dst      *netip.Prefix `json:"dst"`
	GW       *netip.Addr   `json:"gw,omitempty"`
	MTU      int           `json:"mtu,omitempty"`
	AdvMSS   int           `json:"advmss,omitempty"`
	Priority int           `json:"priority,omitempty"`
	Table    *int          `json:"table,omitempty"`
	Scope    *int          `json:"scope,omitempty"`
}

// checkedResult checks a plugin's result and returns it with the known fields only.
func checkedResult(out []byte) ([]byte, error) {
	if !json.Valid(out) {
		return nil, fmt.Errorf("output is not JSON: %s", excerpt(out))
	}

	r, err := parseResult(out)
	if err != nil {
		return nil, fmt.Errorf("invalid result: %w", err)
	}

	return json.Marshal(r)
}

// parseResult parses a result of at most maxStdout bytes and checks all fields. Errors contain the
// field's name.
func parseResult(b []byte) (*result, error) {
	if len(b) > maxStdout {
		return nil, fmt.Errorf("%d bytes exceed the limit of %d", len(b), maxStdout)
	}

	r := &result{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, errors.New(excerpt([]byte(err.Error())))
	}

	if r.CNIVersion != "" {
		if _, _, _, err := version.ParseVersion(r.CNIVersion); err != nil {
			return nil, fmt.Errorf("cniVersion %q is not a valid version", excerpt([]byte(r.CNIVersion)))
		}
	}

	err := errors.Join(r.checkInterfaces(), r.checkIPs(), checkRoutes("routes", r.Routes), checkDNS(r.DNS),
		checkOld("ip4", r.IP4), checkOld("ip6", r.IP6))
	if err != nil {
		return nil, err
	}

	return r, nil
}

func (r *result) checkInterfaces() error {
	if len(r.Interfaces) > maxInterfaces {
		return fmt.Errorf("interfaces: %d exceed the limit of %d", len(r.Interfaces), maxInterfaces)
	}

	for i, f := range r.Interfaces {
		if err := checkInterface(f); err != nil {
			return fmt.Errorf("interfaces[%d]: %w", i, err)
		}
	}

	return nil
}

func checkInterface(f iface) error {
	if err := utils.ValidateInterfaceName(f.Name); err != nil || !isClean(f.Name) {
		return fmt.Errorf("name %q is not a valid interface name", excerpt([]byte(f.Name)))
	}

	if f.MTU < 0 || f.MTU > math.MaxInt32 {
		return fmt.Errorf("mtu %d is out of range", f.MTU)
	}
	if !isClean(f.Mac) || !isClean(f.Sandbox) || !isClean(f.SocketPath) || !isClean(f.PciID) {
		return errors.New("a string is too long or has control characters")
	}

	return nil
}

// isClean reports whether a name or path needs no cleaning.
func isClean(s string) bool { return text.Clean(s, maxResultText) == s }

func (r *result) checkIPs() error {
	if len(r.IPs) > maxIPs {
		return fmt.Errorf("ips: %d exceed the limit of %d", len(r.IPs), maxIPs)
	}

	for i, ip := range r.IPs {
		if err := checkAddress(ip.Address); err != nil && !r.isLoopback(ip) {
			return fmt.Errorf("ips[%d].address: %w", i, err)
		}

		if err := checkGateway(ip.Gateway); err != nil {
			return fmt.Errorf("ips[%d].gateway: %w", i, err)
		}

		if n := ip.Interface; n != nil && (*n < 0 || *n >= len(r.Interfaces)) {
			return fmt.Errorf("ips[%d].interface: %d is not an index of the %d interfaces", i, *n, len(r.Interfaces))
		}
		if v := ip.Version; v != "" && v != "4" && v != "6" {
			return fmt.Errorf("ips[%d].version: %q is neither 4 nor 6", i, excerpt([]byte(v)))
		}
	}

	return nil
}

// isLoopback reports whether an address belongs to lo, as reported by the plugin loopback.
func (r *result) isLoopback(ip ipConfig) bool {
	n := ip.Interface
	return ip.Address != nil && ip.Address.Addr().IsLoopback() && n != nil && *n >= 0 && *n < len(r.Interfaces) &&
		r.Interfaces[*n].Name == loopbackName
}

// checkAddress requires a valid address of a pod's interface.
func checkAddress(p *netip.Prefix) error {
	switch {
	case p == nil || !p.IsValid():
		return errors.New("is missing")
	case !isPodAddress(p.Addr().Unmap()):
		return fmt.Errorf("%s is not a valid pod address", p)
	}
	return nil
}

// isPodAddress reports whether a pod can have an address. It excludes 0.0.0.0, loopback, multicast,
// broadcast and addresses with a zone.
func isPodAddress(a netip.Addr) bool {
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && a.Zone() == "" && a != broadcast
}

// checkGateway rejects zones, since a zone is arbitrary text.
func checkGateway(a *netip.Addr) error {
	if a != nil && a.Zone() != "" {
		return errors.New("must not have a zone")
	}
	return nil
}

func checkRoutes(field string, routes []route) error {
	if len(routes) > maxRoutes {
		return fmt.Errorf("%s: %d exceed the limit of %d", field, len(routes), maxRoutes)
	}

	for i, r := range routes {
		if r.Dst == nil || !r.Dst.IsValid() {
			return fmt.Errorf("%s[%d].dst: is missing", field, i)
		}
		if err := checkGateway(r.GW); err != nil {
			return fmt.Errorf("%s[%d].gw: %w", field, i, err)
		}
	}

	return nil
}

func checkDNS(d *types.DNS) error {
	if d == nil {
		return nil
	}
	if max(len(d.Nameservers), len(d.Search), len(d.Options)) > maxDNSEntries {
		return fmt.Errorf("dns: a list has more than %d entries", maxDNSEntries)
	}

	for _, s := range slices.Concat(d.Nameservers, d.Search, d.Options, []string{d.Domain}) {
		if !isClean(s) {
			return errors.New("dns: a string is too long or has control characters")
		}
	}

	return nil
}

func checkOld(field string, c *ipConfig02) error {
	if c == nil {
		return nil
	}
	if err := checkAddress(c.IP); err != nil {
		return fmt.Errorf("%s.ip: %w", field, err)
	}

	if err := checkGateway(c.Gateway); err != nil {
		return fmt.Errorf("%s.gateway: %w", field, err)
	}

	return checkRoutes(field+".routes", c.Routes)
}

// addresses returns the pod's addresses in the plugins' order: those without an interface, and
// those of the pod's own interface. ours reports whether a path is the pod's namespace.
func (r *result) addresses(ours func(sandbox string) bool) []netip.Addr {
	own := r.ownInterfaces(ours)
	var ips []netip.Addr
	add := func(p *netip.Prefix) {
		if a := p.Addr().Unmap(); isPodAddress(a) && !slices.Contains(ips, a) {
			ips = append(ips, a)
		}
	}

	for _, ip := range r.IPs {
		if ip.Interface == nil || own[*ip.Interface] {
			add(ip.Address)
		}
	}

	for _, c := range []*ipConfig02{r.IP4, r.IP6} {
		if c != nil {
			add(c.IP)
		}
	}

	return ips
}

// ownInterfaces marks the interfaces created for the pod. The first rule matching any interface
// applies. Interfaces of the host and of other namespaces never match.
func (r *result) ownInterfaces(ours func(sandbox string) bool) []bool {
	rules := []func(f iface) bool{
		func(f iface) bool { return f.Name == ifName && f.Sandbox != "" && ours(f.Sandbox) },
		// with another name
		func(f iface) bool { return f.Name != loopbackName && f.Sandbox != "" && ours(f.Sandbox) },
		// of plugins without a namespace in their result
		func(f iface) bool { return f.Name == ifName && f.Sandbox == "" },
	}

	own := make([]bool, len(r.Interfaces))
	for _, rule := range rules {
		if !slices.ContainsFunc(r.Interfaces, rule) {
			continue
		}
		for i, f := range r.Interfaces {
			own[i] = rule(f)
		}
		break
	}

	return own
}

const loopbackName = "lo"

// isNetNS returns a predicate for paths of the network namespace netns: the same path, or another
// path of the same file.
func isNetNS(netns string) func(sandbox string) bool {
	return func(sandbox string) bool {
		if netns == "" {
			return false
		}
		if filepath.Clean(sandbox) == filepath.Clean(netns) {
			return true
		}
		// A plugin in a container may see the directory of pins at another path, but names of pins
		// are unique.
		if name := filepath.Base(netns); isPinName(name) && filepath.Base(sandbox) == name {
			return true
		}

		a, errA := os.Stat(sandbox)
		b, errB := os.Stat(netns)

		return errA == nil && errB == nil && os.SameFile(a, b)
	}
}

// podAddresses returns a pod's addresses in a result of libcni; netns is the path of its namespace.
func podAddresses(r types.Result, netns string) ([]netip.Addr, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("the plugins' result: %w", err)
	}

	checked, err := parseResult(b)
	if err != nil {
		return nil, fmt.Errorf("the plugins' result: %w", err)
	}

	ips := checked.addresses(isNetNS(netns))
	if len(ips) == 0 {
		return nil, fmt.Errorf("the plugins assigned no address to %s of the pod", ifName)
	}

	return ips, nil
}
