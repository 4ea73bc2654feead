package config

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"cri-dockerd/internal/model"
)

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
		c.validateNRI,
	} {
		if err := check(); err != nil {
			return err
		}
	}

	return nil
}

// validateNRI checks the flags of NRI, also without --nri-socket.
func (c *Config) validateNRI() error {
	for flag, p := range map[string]string{
		"nri-socket":     c.NRISocket,
		"nri-plugin-dir": c.NRIPluginDir,
		"nri-config-dir": c.NRIConfigDir,

		"nri-validator-config": c.NRIValidatorConfig,
		"nri-blockio-config":   c.NRIBlockIOConfig,
	} {
		isOptional := flag == "nri-socket" || strings.HasSuffix(flag, "-config")
		if (p != "" || !isOptional) && !filepath.IsAbs(p) {
			return fmt.Errorf("--%s %q: must be an absolute path", flag, p)
		}
	}

	for flag, d := range map[string]time.Duration{
		"nri-plugin-registration-timeout": c.NRIRegistrationTimeout,
		"nri-plugin-request-timeout":      c.NRIRequestTimeout,
	} {
		if d <= 0 {
			return fmt.Errorf("--%s %s: must be positive", flag, d)
		}
	}

	return nil
}

func (c *Config) validatePins() error {
	_, err := model.ParseImagePins(c.PinnedImages, c.PinnedLabels)
	return err
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
		{"containers", c.Containers, []string{"engine", "shim", "auto"}},
		{"log-level", c.LogLevel, []string{"debug", "info", "warn", "error"}},
		{"log-format", c.LogFormat, []string{"text", "json"}},
	} {
		if !slices.Contains(v.known, v.value) {
			return fmt.Errorf("--%s %q: must be one of %q", v.flag, v.value, v.known)
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
			return fmt.Errorf("--%s %q: must be an absolute path", flag, p)
		}
	}

	for _, p := range c.CNIBinDirs {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("--cni-bin-dir %q: must be an absolute path", p)
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
		return fmt.Errorf("--network-plugin-mtu %d: must be between 0 and 65535", c.MTU)
	}
	if c.PullDeadline < 0 {
		return fmt.Errorf("--image-pull-progress-deadline %s: must not be negative; 0 disables the deadline",
			c.PullDeadline)
	}
	return nil
}

func (c *Config) validateCIDRs() error {
	all, err := parseCIDRs(c.PodCIDR)
	if err != nil {
		return err
	}

	if n := len(all); n > 2 || n == 2 && all[0].Addr().Is4() == all[1].Addr().Is4() {
		return fmt.Errorf("--pod-cidr %q: must be one range, or one IPv4 and one IPv6 range", c.PodCIDR)
	}

	return nil
}

func (c *Config) validateStreaming() error {
	switch {
	case c.StreamingTLSCert != "" && c.StreamingTLSKey == "":
		return fmt.Errorf("--streaming-tls-cert-file %q: needs a private key; set "+
			"--streaming-tls-key-file", c.StreamingTLSCert)
	case c.StreamingTLSCert == "" && c.StreamingTLSKey != "":
		return fmt.Errorf("--streaming-tls-key-file %q: needs a certificate; set "+
			"--streaming-tls-cert-file", c.StreamingTLSKey)
	}

	host := c.StreamingAddr
	if h, port, err := net.SplitHostPort(host); err == nil {
		host = h
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("--streaming-bind-addr %q: must be an address or address:port: %w", c.StreamingAddr, err)
		}
	}

	host = strings.Trim(host, "[]")
	if host == "" || host == "localhost" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("--streaming-bind-addr %q: must be an address or address:port: %w", c.StreamingAddr, err)
	}

	return nil
}

func (c *Config) validateMetrics() error {
	a := c.MetricsAddress
	if a == "" || strings.HasPrefix(a, "unix:///") {
		return nil
	}

	const form = "must be unix:///path, tcp://host:port or empty"
	host, ok := strings.CutPrefix(a, "tcp://")
	if !ok {
		return fmt.Errorf("--metrics-bind-address %q: %s", a, form)
	}

	_, port, err := net.SplitHostPort(host)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}

	if err != nil {
		return fmt.Errorf("--metrics-bind-address %q: %s: %w", a, form, err)
	}

	return nil
}

func (c *Config) validateTracing() error {
	if c.TracingRate < 0 || c.TracingRate > 1e6 {
		return fmt.Errorf("--tracing-sampling-rate-per-million %d: must be between 0 and 1000000", c.TracingRate)
	}
	if c.TracingEndpoint == "" {
		return nil
	}

	host, port, err := net.SplitHostPort(c.TracingEndpoint)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}

	if err != nil || host == "" {
		return fmt.Errorf("--tracing-endpoint %q: must be host:port, for example 127.0.0.1:4317", c.TracingEndpoint)
	}

	return nil
}
