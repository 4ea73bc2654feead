package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/prometheus/client_golang/prometheus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/logs"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/podstats"
)

// TestDashboards checks that the metrics in the panels and variables of all dashboards exist.
func TestDashboards(t *testing.T) {
	exposed := exposedMetrics(t)
	files, err := filepath.Glob("../../deploy/grafana/*.json")
	if err != nil || len(files) != 2 {
		t.Fatalf("dashboards %q, %v", files, err)
	}

	for _, file := range files {
		names := 0
		for _, expr := range expressions(t, file) {
			for _, name := range metricNames(expr) {
				names++
				if !exposed[name] {
					t.Errorf("%s: unknown metric %s in %s", filepath.Base(file), name, expr)
				}
			}
		}

		if names < 20 {
			t.Errorf("%s: found only %d metrics", file, names)
		}
	}
}

// TestMetricsAreDocumented compares docs/metrics.md with the metrics of the daemon.
func TestMetricsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}

	documented := map[string]bool{}
	for _, name := range regexp.MustCompile("`(cri_dockerd_[a-z_]+)").FindAllStringSubmatch(string(b), -1) {
		documented[name[1]] = true
	}

	exposed := exposedMetrics(t)
	for name := range exposed {
		base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"), "_sum")
		if strings.HasPrefix(name, "cri_dockerd_") && !documented[name] && !documented[base] {
			t.Errorf("%s: not in docs/metrics.md", name)
		}
	}

	for name := range documented {
		if !exposed[name] && !exposed[name+"_bucket"] {
			t.Errorf("%s: in docs/metrics.md, but not exposed", name)
		}
	}
}

// TestContainerMetricsAreDocumented compares docs/metrics.md with the metrics of containers, with
// their types and labels.
func TestContainerMetricsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}

	rows := regexp.MustCompile("(?m)^\\| `(container_[a-z0-9_]+)` .*$").FindAllStringSubmatch(string(b), -1)
	documented := map[string]string{}
	for _, row := range rows {
		documented[row[1]] = row[0]
	}

	for m := range podstats.Descriptors() {
		kind, labels := "counter", ""
		if m.Gauge {
			kind = "gauge"
		}
		if own := m.Labels[podstats.SharedLabels:]; len(own) > 0 {
			labels = "`" + strings.Join(own, "`, `") + "`"
		}

		want := fmt.Sprintf("| `%s` | %s | %s | ", m.Name, kind, labels)
		if row := documented[m.Name]; !strings.HasPrefix(row, want) {
			t.Errorf("got row %q, want prefix %q", row, want)
		}
		if row := documented[m.Name]; m.When != "" && !strings.HasSuffix(row, "; "+m.When+" |") {
			t.Errorf("got row %q, want the condition %q at its end", row, m.When)
		}

		delete(documented, m.Name)
	}

	for name := range documented {
		t.Errorf("%s: in docs/metrics.md, but not exposed", name)
	}
}

// nriPlugin is a plugin that does nothing.
type nriPlugin struct{}

func (nriPlugin) Synchronize(context.Context, []*api.PodSandbox, []*api.Container) ([]*api.ContainerUpdate, error) {
	return nil, nil
}

func (nriPlugin) RunPodSandbox(context.Context, *api.PodSandbox) error { return nil }

// connectNRI connects a plugin.
func connectNRI(t *testing.T, socket string) {
	t.Helper()
	p, err := stub.New(nriPlugin{}, stub.WithSocketPath(socket), stub.WithPluginName("test"), stub.WithPluginIdx("00"))
	for tries := 0; err == nil && tries < 200; tries++ {
		if err := p.Start(t.Context()); err == nil {
			t.Cleanup(p.Stop)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}

	t.Fatalf("the NRI plugin cannot connect: %v", err)
}

// exposedMetrics returns the names of all metrics of a daemon after a few calls, of a log-driver
// process and of containers.
func exposedMetrics(t *testing.T) map[string]bool {
	t.Helper()
	plugins := t.TempDir()
	plugin := "#!/bin/sh\ncase $CNI_COMMAND in VERSION) echo " +
		"'{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.1.0\"]}';; esac\n"
	err := os.WriteFile(filepath.Join(plugins, "quiet"), []byte(plugin), 0o700) //nolint:gosec // a program
	if err != nil {
		t.Fatal(err)
	}

	socket := filepath.Join(t.TempDir(), "nri.sock")
	r := run(t, "--network-plugin=cni", "--cni-bin-dir="+plugins, "--nri-socket="+socket,
		"--nri-plugin-dir="+t.TempDir())
	connectNRI(t, socket)
	if err := os.MkdirAll(filepath.Join(r.dir, "net.d"), 0o755); err != nil {
		t.Fatal(err)
	}

	conf := `{"cniVersion":"1.1.0","name":"quiet","plugins":[{"type":"quiet"}]}`
	if err := os.WriteFile(filepath.Join(r.dir, "net.d/10.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}

	if _, err := r.image.PullImage(t.Context(),
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "registry.test/app:1"}}); err == nil {
		t.Error("PullImage succeeded")
	}

	page := ""
	// the plugin's STATUS and the first recovery run asynchronously
	for ok := false; !ok; {
		if t.Context().Err() != nil {
			t.Fatalf("missing metrics in:\n%s", page)
		}

		_, page = r.get(t, "/metrics")
		ok = true
		for _, name := range []string{
			"cri_dockerd_cni_errors_total{", "cri_dockerd_cni_duration_seconds_bucket{",
			"cri_dockerd_image_pull_duration_seconds_bucket{", "cri_dockerd_rpc_duration_seconds_bucket{",
			"cri_dockerd_recoveries_total{", "cri_dockerd_resyncs_total{", "cri_dockerd_nri_plugin_changes_total{",
		} {
			ok = ok && strings.Contains(page, name)
		}
	}

	names := map[string]bool{}
	for line := range strings.Lines(page) {
		if line[0] != '#' {
			names[line[:strings.IndexAny(line, "{ ")]] = true
		}
	}

	for _, name := range otherMetrics(t) {
		names[name] = true
	}

	return names
}

// otherMetrics returns the names of the metrics of a log-driver process and of containers.
func otherMetrics(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	d, err := driver.New(driver.Config{
		Directory: filepath.Join(dir, "streams"),
		Version:   "test",
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()

	socket := filepath.Join(dir, "driver.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	srv, served := &http.Server{Handler: d.Handler()}, make(chan error, 1) //nolint:gosec // a test server
	go func() { served <- srv.Serve(l) }()
	defer func() { srv.Close(); <-served }()

	r := prometheus.NewRegistry()
	r.MustRegister(logCollector{
		logs:    logs.New(logs.Config{Mode: logs.ModeJSONFile, Log: slog.New(slog.DiscardHandler)}),
		process: driver.NewClient(socket),
	})
	r.MustRegister(everyMetric{})
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}

	var names []string
	for _, f := range families {
		if f.GetName() == "cri_dockerd_log_driver_up" && f.GetMetric()[0].GetGauge().GetValue() != 1 {
			t.Error("the log-driver process does not respond")
		}
		names = append(names, f.GetName())
	}

	return names
}

// everyMetric collects one sample of each metric of containers.
type everyMetric struct{}

func (everyMetric) Describe(chan<- *prometheus.Desc) {}

func (everyMetric) Collect(out chan<- prometheus.Metric) {
	for d := range podstats.Descriptors() {
		kind := prometheus.CounterValue
		if d.Gauge {
			kind = prometheus.GaugeValue
		}
		desc := prometheus.NewDesc(d.Name, d.Help, d.Labels, nil)
		out <- prometheus.MustNewConstMetric(desc, kind, 1, make([]string, len(d.Labels))...)
	}
}

// expressions returns the PromQL expressions of a dashboard's panels and variables, without
// label_values().
func expressions(t *testing.T, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	var d struct {
		Panels []struct {
			Type    string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Type  string
				Query json.RawMessage
			}
		}
	}

	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatalf("%s: %v", file, err)
	}

	var out []string
	for _, p := range d.Panels {
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s: panel without an expression", file)
		}
		for _, target := range p.Targets {
			out = append(out, target.Expr)
		}
	}

	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}

		var q struct{ Query string }
		if err := json.Unmarshal(v.Query, &q); err != nil {
			t.Fatalf("%s: %v", file, err)
		}

		inner, ok := strings.CutPrefix(q.Query, "label_values(")
		if !ok {
			t.Errorf("%s: variable without label_values: %s", file, q.Query)
		}

		out = append(out, inner[:strings.LastIndexByte(inner, ',')])
	}

	return out
}

// Parts of PromQL expressions without metric names: text in quotes, braces and brackets, and the
// labels of a grouping.
var (
	quoted   = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|'[^']*'`)
	enclosed = regexp.MustCompile(`\{[^}]*\}|\[[^\]]*\]`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)`)
	word     = regexp.MustCompile(`[A-Za-z_:][A-Za-z0-9_:]*\s*\(?`)
	operator = map[string]bool{"and": true, "or": true, "unless": true, "bool": true, "offset": true}
)

// metricNames returns the metrics in an expression.
func metricNames(expr string) []string {
	for _, r := range []*regexp.Regexp{quoted, enclosed, grouping} {
		expr = r.ReplaceAllString(expr, " ")
	}

	var out []string
	for _, w := range word.FindAllString(expr, -1) {
		if name := strings.TrimSpace(w); !strings.HasSuffix(name, "(") && !operator[name] {
			out = append(out, name)
		}
	}

	return out
}

func TestMetricNames(t *testing.T) {
	for _, c := range []struct{ expr, want string }{
		{
			`sum by (le, method) (rate(a_bucket{x="y{z", m=~"$i"}[$__rate_interval])) / on (pod) group_left (b) ` +
				`c > 0 or d`,
			"[a_bucket c d]",
		},
		{`histogram_quantile(0.99, sum by (le) (rate(x_bucket[5m])))`, "[x_bucket]"},
		{`1 - avg(e offset 1)`, "[e]"},
	} {
		t.Run(c.expr, func(t *testing.T) {
			if got := fmt.Sprint(metricNames(c.expr)); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}
