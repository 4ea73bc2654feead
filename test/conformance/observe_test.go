package conformance

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
)

// metricSum returns the sum of the series of a metric with all given labels, such as `code="OK"`.
func metricSum(t *testing.T, page, name string, labels ...string) float64 {
	t.Helper()
	sum := 0.0
	for line := range strings.Lines(page) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), name)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}

		i := strings.LastIndexByte(rest, ' ') // labels may contain spaces
		series, value := rest[:i], rest[i+1:]
		matches := true
		for _, l := range labels {
			matches = matches && strings.Contains(series, l)
		}

		if v, err := strconv.ParseFloat(value, 64); err != nil {
			t.Errorf("%s: %v", line, err)
		} else if matches {
			sum += v
		}
	}

	return sum
}

// TestDaemonMetrics checks the endpoints of the daemon, and the metrics changed by the lifecycle of
// a pod.
func TestDaemonMetrics(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		for _, path := range []string{"/healthz", "/readyz", "/debug/pprof/goroutine?debug=1"} {
			if code, text := n.Get(t, path); code != http.StatusOK {
				t.Errorf("%s: %d, %s", path, code, text)
			}
		}

		before := n.Metrics(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg, []string{"sh", "-c", "echo a line; sleep 1000"})
		during := n.Metrics(t)
		for name, want := range map[string]float64{
			"cri_dockerd_engine_up":     1,
			"cri_dockerd_network_ready": 1,
			"cri_dockerd_log_driver_up": 1,
			"cri_dockerd_build_info":    1,
		} {
			if got := metricSum(t, during, name); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}

		for _, name := range []string{`cri_dockerd_sandboxes{state="ready"}`, `cri_dockerd_containers{state="running"}`,
			"cri_dockerd_images", "cri_dockerd_network_attachments"} {
			name, label, _ := strings.Cut(strings.TrimSuffix(name, "}"), "{")
			if got := metricSum(t, during, name, label); got < 1 {
				t.Errorf("%s with %q is %v, want at least 1", name, label, got)
			}
		}

		n.stopPod(t, pod)
		n.removePod(t, pod)
		after := n.Metrics(t)
		for _, series := range [][]string{
			{"cri_dockerd_rpc_duration_seconds_count", `method="RunPodSandbox"`, `code="OK"`},
			{"cri_dockerd_rpc_duration_seconds_count", `method="StartContainer"`, `code="OK"`},
			{"cri_dockerd_rpc_duration_seconds_count", `method="RemovePodSandbox"`, `code="OK"`},
			{"cri_dockerd_engine_request_duration_seconds_count", `operation="POST /containers/{id}/start"`,
				`code="204"`},
			{"cri_dockerd_engine_request_duration_seconds_count", `operation="POST /containers/create"`, `code="201"`},
			{"cri_dockerd_cni_duration_seconds_count", `command="ADD"`, `plugin="bridge"`},
			{"cri_dockerd_cni_duration_seconds_count", `command="DEL"`, `plugin="bridge"`},
			{"cri_dockerd_log_lines_total"},
			{"cri_dockerd_event_lag_seconds_count"},
		} {
			if before, after := metricSum(t, before, series[0], series[1:]...),
				metricSum(t, after, series[0], series[1:]...); after <= before {
				t.Errorf("%q went from %v to %v, want an increase", series, before, after)
			}
		}

		for line := range strings.Lines(after) {
			if strings.HasPrefix(line, "cri_dockerd_") &&
				(strings.Contains(line, pod) || strings.Contains(line, pod[:12])) {
				t.Errorf("metric of the daemon has an ID: %s", line)
			}
		}
	})
}

// TestReload sends SIGHUP: the daemon reads everything again and does not affect pods.
func TestReload(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.private(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, []string{"sleep", "1000"})
		before, pid := metricSum(t, n.Metrics(t), "cri_dockerd_resyncs_total", `reason="reload"`),
			n.inspect(t, c, ".State.Pid")
		n.Reload(t)
		eventually(t, "full resync", func() bool {
			return metricSum(t, n.Metrics(t), "cri_dockerd_resyncs_total", `reason="reload"`) > before
		})
		if after := n.inspect(t, c, ".State.Pid"); after != pid {
			t.Errorf("PID of the container before the reload %s, after it %s", pid, after)
		}
		if code, why := n.Get(t, "/readyz"); code != http.StatusOK {
			t.Errorf("readyz: %d, %s", code, why)
		}

		n.removePod(t, pod)
	})
}
