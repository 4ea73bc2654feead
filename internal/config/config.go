// Package config defines the daemon's configuration: one struct, its flags with their defaults, and
// its validation. It has no other behaviour.
package config

import (
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/secret"
)

// Config holds the values of all flags.
type Config struct {
	Endpoint       string // address of the CRI server
	DockerEndpoint string // "" means DOCKER_HOST and related variables
	RootDirectory  string
	RunDirectory   string
	// PinDirectory holds pods' network namespaces. There is no flag: network add-ons support only
	// this directory.
	PinDirectory     string
	PauseImage       string        // "" means the embedded image
	PinnedImages     []string      // names with "*", see model.ParseImagePins
	PinnedLabels     []string      // selectors of image labels
	PullDeadline     time.Duration // limit for a pull without progress
	RequestTimeout   time.Duration // accepted, unused
	StreamingAddr    string
	StreamingTLSCert string // "" means plain text
	StreamingTLSKey  string
	NetworkPlugin    string // cni, kubenet or ""
	CNIConfDir       string
	CNIBinDirs       []string
	CNICacheDir      string
	PodNetNS         string // own or engine
	MTU              int
	HairpinMode      string
	PodCIDR          []string
	IPv6DualStack    bool   // accepted, unused
	RuntimeCgroups   string // accepted, unused
	ContainerLog     string // auto, cri or json-file
	MetricsAddress   string // "" disables the metrics server
	TracingEndpoint  string // "" disables tracing
	TracingRate      int    // samples per million
	LogLevel         string
	LogFormat        string
	TLSCert          string
	TLSKey           string
	TLSClientCA      string
	setUnusedFlags   []string
}

// unused maps flags of older shims without effect to the reason.
var unused = map[string]string{
	"runtime-request-timeout": "the deadline of the caller applies to each call",
	"runtime-cgroups":         "the daemon remains in its initial cgroup; set Slice= in its unit",
	"ipv6-dual-stack":         "the pod network determines the IP families; for kubenet, set --pod-cidr to two ranges",
}

// pinDirectory is the directory of network namespaces for containerd, CRI-O and ip-netns(8). Agents
// of network add-ons mount it.
const pinDirectory = "/var/run/netns"

// Register adds every flag to f with its default.
func (c *Config) Register(f *pflag.FlagSet) {
	c.PinDirectory = pinDirectory
	f.StringVar(&c.Endpoint, "container-runtime-endpoint", "unix:///var/run/cri-dockerd.sock",
		"endpoint of the CRI server: unix:///path, fd:// (systemd socket activation) or tcp://host:port")
	f.StringVar(&c.DockerEndpoint, "docker-endpoint", "unix:///var/run/docker.sock",
		"endpoint of the Docker API; if empty, DOCKER_HOST and related environment variables apply")
	f.StringVar(&c.RootDirectory, "cri-dockerd-root-directory", "/var/lib/cri-dockerd",
		"directory for the daemon's lock and for the state of older shims")
	f.StringVar(&c.RunDirectory, "run-directory", "/run/cri-dockerd",
		"directory for network namespaces and the log table; must survive restarts of the daemon")
	f.StringVar(&c.PauseImage, "pod-infra-container-image", "",
		"sandbox image; empty for the embedded image, which requires no registry")
	f.StringSliceVar(&c.PinnedImages, "pinned-images", nil, "comma-separated names of images to "+
		"exclude from garbage collection; * matches any characters, and a name without a tag matches all tags")
	f.StringSliceVar(&c.PinnedLabels, "pinned-image-labels", nil,
		"comma-separated label selectors of images to exclude from garbage collection: key, key=value, !key or "+
			"key!=value")
	f.DurationVar(&c.PullDeadline, "image-pull-progress-deadline", time.Minute,
		"cancel an image pull that makes no progress for this long")
	f.DurationVar(&c.RequestTimeout, "runtime-request-timeout", 0, "no effect: "+unused["runtime-request-timeout"])
	f.StringVar(&c.StreamingAddr, "streaming-bind-addr", "", "address or address:port of the server for "+
		"exec, attach and port-forward; empty for a free port on 127.0.0.1")
	f.StringVar(&c.StreamingTLSCert, "streaming-tls-cert-file", "", "TLS certificate of the server for "+
		"exec, attach and port-forward, trusted by the kubelet; empty for plain text")
	f.StringVar(&c.StreamingTLSKey, "streaming-tls-key-file", "", "private key of --streaming-tls-cert-file")
	f.StringVar(&c.NetworkPlugin, "network-plugin", "cni",
		"network plugin: cni, kubenet, or empty for Docker's default bridge")
	f.StringVar(&c.CNIConfDir, "cni-conf-dir", "/etc/cni/net.d", "directory of CNI configurations")
	f.StringSliceVar(&c.CNIBinDirs, "cni-bin-dir", []string{"/opt/cni/bin", "/usr/lib/cni"},
		"comma-separated directories of CNI plugins")
	f.StringVar(&c.CNICacheDir, "cni-cache-dir", "/var/lib/cni/cache", "directory of the CNI cache")
	f.StringVar(&c.PodNetNS, "pod-netns", "own", "creator of pod network namespaces: own (the daemon if supported "+
		"by sandbox image and engine, otherwise the engine) or engine")
	f.IntVar(&c.MTU, "network-plugin-mtu", 0, "MTU of kubenet's bridge in bytes; 0 for the default of the plugin")
	f.StringVar(&c.HairpinMode, "hairpin-mode", "none", "kubenet's support for pods that access themselves through a "+
		"Service: none, hairpin-veth or promiscuous-bridge (same as hairpin-veth with bridge-nf-call-iptables)")
	f.StringSliceVar(&c.PodCIDR, "pod-cidr", nil, "comma-separated pod CIDRs of kubenet, at most one per IP family; "+
		"empty for the CIDR from the kubelet")
	f.BoolVar(&c.IPv6DualStack, "ipv6-dual-stack", false, "no effect: "+unused["ipv6-dual-stack"])
	f.StringVar(&c.RuntimeCgroups, "runtime-cgroups", "", "no effect: "+unused["runtime-cgroups"])
	f.StringVar(&c.ContainerLog, "container-log", "auto", "container logs: cri (files in CRI format, written by the "+
		"log-driver process), json-file (links to Docker's logs) or auto (cri if supported by the engine)")
	f.StringVar(&c.MetricsAddress, "metrics-bind-address", "unix:///run/cri-dockerd/metrics.sock",
		"address of /metrics, /healthz and /readyz: unix:///path (by default metrics.sock in --run-directory) or "+
			"tcp://host:port; empty to disable")
	f.StringVar(&c.TracingEndpoint, "tracing-endpoint", "", "host:port of an OpenTelemetry collector (OTLP over "+
		"gRPC); empty to disable tracing")
	f.IntVar(&c.TracingRate, "tracing-sampling-rate-per-million", 0,
		"number of traced calls per million calls without a trace context; all others follow the kubelet's decision")
	f.StringVar(&c.LogLevel, "log-level", "info", "log level: debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "log format: text or json")
	f.StringVar(&c.TLSCert, "tls-cert-file", "", "TLS certificate of a tcp:// endpoint outside of loopback")
	f.StringVar(&c.TLSKey, "tls-key-file", "", "private key of --tls-cert-file")
	f.StringVar(&c.TLSClientCA, "tls-client-ca-file", "", "certificate authorities for clients of a tcp:// endpoint")
}

// Complete sets values derived from other flags, replaces older spellings, and records the unused
// flags in f. Call Validate next.
func (c *Config) Complete(f *pflag.FlagSet) {
	if level, ok := logrusLevels[c.LogLevel]; ok {
		c.LogLevel = level
	}
	// A second daemon has another run directory.
	if f.Lookup("metrics-bind-address") != nil && !f.Changed("metrics-bind-address") {
		c.MetricsAddress = "unix://" + filepath.Join(c.RunDirectory, "metrics.sock")
	}

	f.Visit(func(flag *pflag.Flag) {
		if _, ok := unused[flag.Name]; ok {
			c.setUnusedFlags = append(c.setUnusedFlags, flag.Name)
		}
	})
}

// logrusLevels maps the log levels of older shims to the present ones.
var logrusLevels = map[string]string{
	"trace":   "debug",
	"warning": "warn",
	"fatal":   "error",
	"panic":   "error",
}

// Validate checks a complete configuration without changing it. The error names the flag and the
// fix.
func (c *Config) Validate() error {
	for _, check := range []func() error{
		c.validateNames,
		c.validatePaths,
		c.validateNumbers,
		c.validateCIDRs,
		c.validateStreaming,
		c.validatePins,
		c.validateMetrics,
		c.validateTracing,
	} {
		if err := check(); err != nil {
			return err
		}
	}

	return nil
}

func (c *Config) validatePins() error {
	_, err := model.ParseImagePins(c.PinnedImages, c.PinnedLabels)
	return err
}

// ImagePins returns the pinned images of a valid configuration.
func (c *Config) ImagePins() model.ImagePins {
	pins, _ := model.ParseImagePins(c.PinnedImages, c.PinnedLabels)
	return pins
}

func (c *Config) validateNames() error {
	for _, v := range []struct {
		flag, value string
		known       []string
	}{
		{"network-plugin", c.NetworkPlugin, []string{"cni", "kubenet", ""}},
		{"hairpin-mode", c.HairpinMode, []string{"none", "hairpin-veth", "promiscuous-bridge"}},
		{"pod-netns", c.PodNetNS, []string{"own", "engine"}},
		{"container-log", c.ContainerLog, []string{"auto", "cri", "json-file"}},
		{"log-level", c.LogLevel, []string{"debug", "info", "warn", "error"}},
		{"log-format", c.LogFormat, []string{"text", "json"}},
	} {
		if !slices.Contains(v.known, v.value) {
			return fmt.Errorf("--%s %q: use one of %q", v.flag, v.value, v.known)
		}
	}

	return nil
}

func (c *Config) validatePaths() error {
	for flag, p := range map[string]string{
		"cri-dockerd-root-directory": c.RootDirectory,
		"run-directory":              c.RunDirectory,
		"cni-conf-dir":               c.CNIConfDir,
		"cni-cache-dir":              c.CNICacheDir,
	} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("--%s %q: give an absolute path", flag, p)
		}
	}

	for _, p := range c.CNIBinDirs {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("--cni-bin-dir %q: give absolute paths", p)
		}
	}

	given := 0
	for _, p := range []string{c.TLSCert, c.TLSKey, c.TLSClientCA} {
		if p != "" {
			given++
		}
	}

	if given != 0 && given != 3 {
		return fmt.Errorf("--tls-cert-file, --tls-key-file and --tls-client-ca-file must be set together")
	}

	return nil
}

func (c *Config) validateNumbers() error {
	if c.MTU < 0 || c.MTU > 65535 {
		return fmt.Errorf("--network-plugin-mtu %d: give 0 to 65535 bytes", c.MTU)
	}
	if c.PullDeadline < 0 {
		return fmt.Errorf("--image-pull-progress-deadline %s: give 0 (none) or more", c.PullDeadline)
	}
	return nil
}

func (c *Config) validateCIDRs() error {
	all, err := parseCIDRs(c.PodCIDR)
	if err != nil {
		return err
	}

	if n := len(all); n > 2 || n == 2 && all[0].Addr().Is4() == all[1].Addr().Is4() {
		return fmt.Errorf("--pod-cidr %q: give one range, or one for each of IPv4 and IPv6", c.PodCIDR)
	}

	return nil
}

func parseCIDRs(texts []string) (all []netip.Prefix, err error) {
	for _, s := range texts {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}

		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("--pod-cidr %q: give ranges like 10.244.1.0/24: %w", s, err)
		}

		all = append(all, p.Masked())
	}

	return all, nil
}

func (c *Config) validateStreaming() error {
	switch {
	case c.StreamingTLSCert != "" && c.StreamingTLSKey == "":
		return fmt.Errorf("--streaming-tls-cert-file %q needs the key of the certificate; give "+
			"--streaming-tls-key-file", c.StreamingTLSCert)
	case c.StreamingTLSCert == "" && c.StreamingTLSKey != "":
		return fmt.Errorf("--streaming-tls-key-file %q needs the certificate of the key; give "+
			"--streaming-tls-cert-file", c.StreamingTLSKey)
	}

	host := c.StreamingAddr
	if h, port, err := net.SplitHostPort(host); err == nil {
		host = h
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("--streaming-bind-addr %q: give an address or address:port: %w", c.StreamingAddr, err)
		}
	}

	host = strings.Trim(host, "[]")
	if host == "" || host == "localhost" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("--streaming-bind-addr %q: give an address or address:port: %w", c.StreamingAddr, err)
	}

	return nil
}

func (c *Config) validateMetrics() error {
	a := c.MetricsAddress
	if a == "" || strings.HasPrefix(a, "unix:///") {
		return nil
	}

	const fix = "give unix:///path or tcp://host:port, or leave it empty"
	host, ok := strings.CutPrefix(a, "tcp://")
	if !ok {
		return fmt.Errorf("--metrics-bind-address %q: %s", a, fix)
	}

	_, port, err := net.SplitHostPort(host)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}

	if err != nil {
		return fmt.Errorf("--metrics-bind-address %q: %s: %w", a, fix, err)
	}

	return nil
}

func (c *Config) validateTracing() error {
	if c.TracingRate < 0 || c.TracingRate > 1e6 {
		return fmt.Errorf("--tracing-sampling-rate-per-million %d: give 0 to 1000000", c.TracingRate)
	}
	if c.TracingEndpoint == "" {
		return nil
	}

	host, port, err := net.SplitHostPort(c.TracingEndpoint)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}

	if err != nil || host == "" {
		return fmt.Errorf("--tracing-endpoint %q: give host:port, as in 127.0.0.1:4317", c.TracingEndpoint)
	}

	return nil
}

// CIDRs returns the pod ranges of a valid configuration.
func (c *Config) CIDRs() []netip.Prefix {
	all, _ := parseCIDRs(c.PodCIDR)
	return all
}

// PinRecords returns the directory for records of pinned network namespaces, and for namespaces
// without a sandbox.
func (c *Config) PinRecords() string { return filepath.Join(c.RunDirectory, "netns") }

// EngineNetNS returns the reason if the engine must create pods' network namespaces, "" otherwise.
func (c *Config) EngineNetNS() string {
	switch {
	case c.PodNetNS == "engine":
		return "--pod-netns=engine"
	case c.PauseImage != "":
		return "the sandbox image is not the embedded one (--pod-infra-container-image)"
	}
	return ""
}

// Warnings returns a line for each unused flag on the command line. Call Complete first.
func (c *Config) Warnings() []string {
	var out []string
	for _, name := range c.setUnusedFlags {
		out = append(out, fmt.Sprintf("--%s has no effect: %s", name, unused[name]))
	}
	return out
}

// Logger returns a logger to standard error for the configured level and format. It masks
// credentials.
func (c *Config) Logger() *slog.Logger { return c.logger(os.Stderr) }

func (c *Config) logger(w io.Writer) *slog.Logger {
	level := map[string]slog.Level{
		"debug": slog.LevelDebug,
		"warn":  slog.LevelWarn,
		"error": slog.LevelError,
	}[c.LogLevel]

	o := &slog.HandlerOptions{Level: level, ReplaceAttr: secret.Attr}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}

	return slog.New(slog.NewTextHandler(w, o))
}

// Nearest returns the name of the flag in f most similar to an unknown name.
func Nearest(f *pflag.FlagSet, name string) string {
	best, distance := "", math.MaxInt
	f.VisitAll(func(flag *pflag.Flag) {
		if d := editDistance(flag.Name, name); d < distance {
			best, distance = flag.Name, d
		}
	})
	return best
}

// editDistance returns the Levenshtein distance of two words.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}

	for i := range len(a) {
		previous := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			previous, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, previous+cost)
		}
	}

	return row[len(b)]
}
