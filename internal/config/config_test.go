package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// parse returns the configuration of a command line.
func parse(args ...string) (*Config, *pflag.FlagSet, error) {
	c, f := &Config{}, pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	c.Register(f)
	if err := f.Parse(args); err != nil {
		return nil, f, err
	}

	c.Complete(f)
	complete := fmt.Sprintf("%+v", c)
	err := c.Validate()
	if after := fmt.Sprintf("%+v", c); after != complete {
		panic("Validate changed the configuration: " + complete + " to " + after)
	}

	return c, f, err
}

// TestFlagsOfOlderShims checks every flag in the units of existing nodes, with its default and a
// value.
func TestFlagsOfOlderShims(t *testing.T) {
	for _, flag := range []struct{ name, byDefault, value string }{
		{"container-runtime-endpoint", "unix:///var/run/cri-dockerd.sock", "fd://"},
		{"docker-endpoint", "unix:///var/run/docker.sock", ""},
		{"cri-dockerd-root-directory", "/var/lib/cri-dockerd", "/data/cri"},
		{"pod-infra-container-image", "", "registry.example/pause:3.10"},
		{"pinned-images", "[]", "registry.example/*,web:1"},
		{"pinned-image-labels", "[]", "team=platform,keep"},
		{"image-pull-progress-deadline", "1m0s", "5m"},
		{"runtime-request-timeout", "0s", "15m"},
		{"streaming-bind-addr", "", "127.0.0.1:10010"},
		{"network-plugin", "cni", "kubenet"},
		{"cni-conf-dir", "/etc/cni/net.d", "/x/net.d"},
		{"cni-bin-dir", "[/opt/cni/bin,/usr/lib/cni]", "/a,/b"},
		{"cni-cache-dir", "/var/lib/cni/cache", "/x/cache"},
		{"network-plugin-mtu", "0", "1450"},
		{"hairpin-mode", "none", "hairpin-veth"},
		{"pod-cidr", "[]", "10.88.0.0/24,fd00:88::/64"},
		{"ipv6-dual-stack", "false", "True"},
		{"runtime-cgroups", "", "/systemd/system.slice"},
		{"log-level", "info", "warning"},
	} {
		t.Run(flag.name, func(t *testing.T) {
			c, f, err := parse("--" + flag.name + "=" + flag.value)
			if err != nil {
				t.Fatalf("--%s=%s: %v", flag.name, flag.value, err)
			}

			if got := f.Lookup(flag.name).DefValue; got != flag.byDefault {
				t.Errorf("default %q, want %q", got, flag.byDefault)
			}

			_, isUnused := unused[flag.name]
			if w := c.Warnings(); (len(w) == 1) != isUnused || isUnused && !strings.Contains(w[0], "--"+flag.name) {
				t.Errorf("warnings %q", w)
			}
		})
	}
}

func TestStreamingTLS(t *testing.T) {
	c, _, err := parse("--streaming-tls-cert-file=/x/cert.pem", "--streaming-tls-key-file=/x/key.pem")
	if err != nil || c.StreamingTLSCert != "/x/cert.pem" || c.StreamingTLSKey != "/x/key.pem" {
		t.Errorf("%+v, %v", c, err)
	}

	for given, missing := range map[string]string{
		"streaming-tls-cert-file": "streaming-tls-key-file",
		"streaming-tls-key-file":  "streaming-tls-cert-file",
	} {
		if _, _, err := parse("--" + given + "=/x"); err == nil || !strings.Contains(err.Error(), "set --"+missing) {
			t.Errorf("--%s alone: %v", given, err)
		}
	}
}

func TestDefaultsAreValid(t *testing.T) {
	c, _, err := parse()
	if err != nil || len(c.Warnings()) != 0 {
		t.Errorf("%v, %q", err, c.Warnings())
	}
}

// TestMetricsAddress checks that the default address follows the run directory, so two daemons
// never conflict.
func TestMetricsAddress(t *testing.T) {
	for want, args := range map[string][]string{
		"unix:///run/cri-dockerd/metrics.sock": nil,
		"unix:///x/run/metrics.sock":           {"--run-directory=/x/run"},
		"unix:///x/m.sock":                     {"--run-directory=/x/run", "--metrics-bind-address=unix:///x/m.sock"},
		"tcp://127.0.0.1:9090":                 {"--metrics-bind-address=tcp://127.0.0.1:9090"},
		"":                                     {"--metrics-bind-address="},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			if c, _, err := parse(args...); err != nil || c.MetricsAddress != want {
				t.Errorf("%+v, %v; want %q", c, err, want)
			}
		})
	}
}

func TestErrorsNameTheFlag(t *testing.T) {
	args := []string{
		"--network-plugin=calico",
		"--hairpin-mode=maybe",
		"--log-level=loud",
		"--log-format=xml",
		"--cri-dockerd-root-directory=rel",
		"--run-directory=rel",
		"--cni-conf-dir=rel",
		"--cni-bin-dir=/a,rel",
		"--cni-cache-dir=",
		"--network-plugin-mtu=-1",
		"--network-plugin-mtu=70000",
		"--image-pull-progress-deadline=-1s",
		"--pod-cidr=10.0.0.0",
		"--pod-cidr=10.0.0.0/24,10.1.0.0/24",
		"--pod-cidr=10.0.0.0/24,fd00::/64,10.1.0.0/24",
		"--streaming-bind-addr=some.host",
		"--streaming-bind-addr=127.0.0.1:many",
		"--streaming-bind-addr=127.0.0.1:70000",
		"--streaming-tls-cert-file=/x",
		"--streaming-tls-key-file=/x",
		"--tls-cert-file=/x",
		"--ipv6-dual-stack=maybe",
		"--runtime-request-timeout=soon",
		"--metrics-bind-address=:9090",
		"--metrics-bind-address=tcp://127.0.0.1",
		"--metrics-bind-address=tcp://127.0.0.1:many",
		"--tracing-endpoint=http://127.0.0.1:4317",
		"--tracing-endpoint=:4317",
		"--tracing-endpoint=host",
		"--tracing-sampling-rate-per-million=-1",
		"--tracing-sampling-rate-per-million=1000001",
	}

	for _, arg := range args {
		t.Run(arg, func(t *testing.T) {
			name, _, _ := strings.Cut(arg, "=")
			if _, _, err := parse(arg); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("error %v, want one with %s", err, name)
			}
		})
	}
}

func TestPodCIDRs(t *testing.T) {
	c, _, err := parse("--pod-cidr=10.88.0.7/24, fd00:88::/64")
	if err != nil {
		t.Fatal(err)
	}

	var got []string
	for _, p := range c.CIDRs() {
		got = append(got, p.String())
	}

	if diff := cmp.Diff([]string{"10.88.0.0/24", "fd00:88::/64"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestNearest(t *testing.T) {
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	(&Config{}).Register(f)

	for wrong, want := range map[string]string{
		"container-runtime-endpont": "container-runtime-endpoint",
		"cni-bindir":                "cni-bin-dir",
		"podcidr":                   "pod-cidr",
		"log-leve":                  "log-level",
		"network_plugin":            "network-plugin",
		"xyzzy-quux-frobnicate-now": "log-format",
	} {
		t.Run(wrong, func(t *testing.T) {
			if got := Nearest(f, wrong); got != want {
				t.Errorf("Nearest(%q) = %q, want %q", wrong, got, want)
			}
		})
	}
}

func TestEditDistance(t *testing.T) {
	cases := []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"", "abc", 3},
		{"abc", "", 3},
		{"kitten", "sitting", 3},
		{"flaw", "lawn", 2},
		{"same", "same", 0},
	}

	for _, c := range cases {
		t.Run(c.a+" "+c.b, func(t *testing.T) {
			if got := editDistance(c.a, c.b); got != c.want {
				t.Errorf("editDistance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
			}
		})
	}
}

// TestLogger checks levels, formats and the masking of credentials.
func TestLogger(t *testing.T) {
	for level, want := range map[string]int{"debug": 4, "info": 3, "warn": 2, "error": 1} {
		for format, begin := range map[string]string{"text": "time=", "json": `{"time":`} {
			c, _, err := parse("--log-level="+level, "--log-format="+format)
			if err != nil {
				t.Fatal(err)
			}

			var out bytes.Buffer
			log := c.logger(&out)
			for _, write := range []func(string, ...any){log.Debug, log.Info, log.Warn, log.Error} {
				write("Get https://bob:s3cret@registry.test", "err", errors.New("Authorization: Bearer s3cret"))
			}

			if n := strings.Count(out.String(), "\n"); n != want || !strings.HasPrefix(out.String(), begin) ||
				strings.Contains(out.String(), "s3cret") {
				t.Errorf("%s, %s:\n%s", level, format, out.String())
			}
		}
	}
}
