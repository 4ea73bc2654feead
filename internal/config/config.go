// Package config defines the daemon's configuration: one struct, its flags with their defaults, and
// its validation. It has no other behaviour.
package config

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

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
	Containers       string // engine, shim or auto
	NRISocket        string // "" disables NRI plugins
	NRIPluginDir     string
	NRIConfigDir     string
	// NRIValidatorConfig configures NRI's default validator, "" for none.
	NRIValidatorConfig string
	// NRIBlockIOConfig has the classes of block I/O for NRI plugins, "" for none.
	NRIBlockIOConfig string
	// NRIRegistrationTimeout bounds the registration of a plugin, and NRIRequestTimeout each of its
	// responses.
	NRIRegistrationTimeout, NRIRequestTimeout time.Duration

	MetricsAddress  string // "" disables the metrics server
	TracingEndpoint string // "" disables tracing
	TracingRate     int    // samples per million
	LogLevel        string
	LogFormat       string
	TLSCert         string
	TLSKey          string
	TLSClientCA     string
	ignoredFlags    []string // flags of the command line without effect
}

// ImagePins returns the pinned images of a valid configuration.
func (c *Config) ImagePins() model.ImagePins {
	pins, _ := model.ParseImagePins(c.PinnedImages, c.PinnedLabels)
	return pins
}

// parseCIDRs parses the values of --pod-cidr.
func parseCIDRs(texts []string) (all []netip.Prefix, err error) {
	for _, s := range texts {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}

		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("--pod-cidr %q: must be a range like 10.244.1.0/24: %w", s, err)
		}

		all = append(all, p.Masked())
	}

	return all, nil
}

// CIDRs returns the pod ranges of a valid configuration.
func (c *Config) CIDRs() []netip.Prefix {
	all, _ := parseCIDRs(c.PodCIDR)
	return all
}

// ExecOutput returns the directory for the output of execs from the containerd shim.
func (c *Config) ExecOutput() string { return filepath.Join(c.RunDirectory, "exec") }

// Adjustments returns the directory for the adjustments of NRI plugins.
func (c *Config) Adjustments() string { return filepath.Join(c.RunDirectory, "nri") }

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
