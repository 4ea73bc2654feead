package config

import (
	"fmt"
	"math"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
)

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
	f.StringVar(&c.Containers, "containers", "auto", "runtime of new pods: engine (Docker's default runtime), shim "+
		"(this project's containerd shim, Docker Engine 24 or later) or auto (the shim if it works)")
	f.StringVar(&c.RunDirectory, "run-directory", "/run/cri-dockerd",
		"directory for network namespaces, the log table and the output of execs; must survive restarts of the daemon")

	f.StringVar(&c.TLSCert, "tls-cert-file", "", "TLS certificate of a tcp:// endpoint outside of loopback")
	f.StringVar(&c.TLSKey, "tls-key-file", "", "private key of --tls-cert-file")
	f.StringVar(&c.TLSClientCA, "tls-client-ca-file", "", "certificate authorities for clients of a tcp:// endpoint")

	c.registerImages(f)
	c.registerStreaming(f)
	c.registerNetwork(f)
	c.registerNRI(f)
	c.registerObservability(f)
	c.registerLegacy(f)
}

func (c *Config) registerImages(f *pflag.FlagSet) {
	f.StringVar(&c.PauseImage, "pod-infra-container-image", "",
		"sandbox image; empty for the embedded image, which requires no registry")
	f.StringSliceVar(&c.PinnedImages, "pinned-images", nil, "comma-separated names of images to "+
		"exclude from garbage collection; * matches any characters, and a name without a tag matches all tags")
	f.StringSliceVar(&c.PinnedLabels, "pinned-image-labels", nil,
		"comma-separated label selectors of images to exclude from garbage collection: key, key=value, !key or "+
			"key!=value")
	f.DurationVar(&c.PullDeadline, "image-pull-progress-deadline", time.Minute,
		"cancel an image pull that makes no progress for this long")
}

func (c *Config) registerStreaming(f *pflag.FlagSet) {
	f.StringVar(&c.StreamingAddr, "streaming-bind-addr", "", "address or address:port of the server for "+
		"exec, attach and port-forward; empty for a free port on 127.0.0.1")
	f.StringVar(&c.StreamingTLSCert, "streaming-tls-cert-file", "", "TLS certificate of the server for "+
		"exec, attach and port-forward, trusted by the kubelet; empty for plain text")
	f.StringVar(&c.StreamingTLSKey, "streaming-tls-key-file", "", "private key of --streaming-tls-cert-file")
}

func (c *Config) registerNetwork(f *pflag.FlagSet) {
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
}

// registerNRI adds the flags of NRI. Their defaults are containerd's.
func (c *Config) registerNRI(f *pflag.FlagSet) {
	f.StringVar(&c.NRISocket, "nri-socket", "", "socket for NRI plugins, usually /var/run/nri/nri.sock; empty to "+
		"disable NRI")
	f.StringVar(&c.NRIPluginDir, "nri-plugin-dir", "/opt/nri/plugins",
		"directory of NRI plugins to start with the daemon, as root; only with --nri-socket")
	f.StringVar(&c.NRIConfigDir, "nri-config-dir", "/etc/nri/conf.d",
		"directory of configurations for the plugins of --nri-plugin-dir")
	f.StringVar(&c.NRIValidatorConfig, "nri-validator-config", "", "file with the rules of NRI's default validator "+
		"for the adjustments of plugins; empty for no rules")
	f.StringVar(&c.NRIBlockIOConfig, "nri-blockio-config", "", "file with the classes of block I/O for NRI plugins; "+
		"empty for no classes")
	f.DurationVar(&c.NRIRegistrationTimeout, "nri-plugin-registration-timeout", 5*time.Second,
		"limit for the registration of an NRI plugin")
	f.DurationVar(&c.NRIRequestTimeout, "nri-plugin-request-timeout", 2*time.Second,
		"limit for each response of an NRI plugin; a plugin that exceeds it is disconnected")
}

func (c *Config) registerObservability(f *pflag.FlagSet) {
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
}

// registerLegacy adds flags without effect.
func (c *Config) registerLegacy(f *pflag.FlagSet) {
	f.DurationVar(&c.RequestTimeout, "runtime-request-timeout", 0, "no effect: "+unused["runtime-request-timeout"])
	f.BoolVar(&c.IPv6DualStack, "ipv6-dual-stack", false, "no effect: "+unused["ipv6-dual-stack"])
	f.StringVar(&c.RuntimeCgroups, "runtime-cgroups", "", "no effect: "+unused["runtime-cgroups"])
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
			c.ignoredFlags = append(c.ignoredFlags, flag.Name)
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

// Warnings returns a line for each unused flag on the command line. Call Complete first.
func (c *Config) Warnings() []string {
	var out []string
	for _, name := range c.ignoredFlags {
		out = append(out, fmt.Sprintf("--%s has no effect: %s", name, unused[name]))
	}
	return out
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
