package cri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podstats"
)

// nodeTest lists the container and pod metrics required by Kubernetes' NodeConformance suite
// (ContainerMetrics), except optional ones and those of a CRI without a thread limit.
var nodeTest = []string{
	"container_blkio_device_usage_total", "container_cpu_system_seconds_total", "container_cpu_usage_seconds_total",
	"container_cpu_user_seconds_total",
	"container_file_descriptors", "container_fs_reads_bytes_total", "container_fs_reads_total",
	"container_fs_usage_bytes", "container_fs_writes_bytes_total",
	"container_fs_writes_total", "container_last_seen", "container_memory_cache", "container_memory_failcnt",
	"container_memory_events_high_total", "container_memory_events_max_total",
	"container_memory_failures_total",
	"container_memory_mapped_file", "container_memory_max_usage_bytes", "container_memory_rss", "container_memory_swap",
	"container_memory_usage_bytes",
	"container_memory_working_set_bytes", "container_oom_events_total", "container_processes", "container_sockets",
	"container_spec_cpu_period",
	"container_spec_cpu_shares", "container_spec_memory_limit_bytes", "container_spec_memory_reservation_limit_bytes",
	"container_spec_memory_swap_limit_bytes",
	"container_start_time_seconds", "container_threads", "container_threads_max", "container_ulimits_soft",
	"container_network_receive_bytes_total", "container_network_receive_errors_total",
	"container_network_receive_packets_dropped_total",
	"container_network_receive_packets_total", "container_network_transmit_bytes_total",
	"container_network_transmit_errors_total",
	"container_network_transmit_packets_dropped_total", "container_network_transmit_packets_total",
}

// nodeTestOfNode lists the required metrics not tied to a container, for example those of the node.
var nodeTestOfNode = []string{
	"container_fs_io_current", "container_fs_io_time_seconds_total", "container_fs_io_time_weighted_seconds_total",
	"container_fs_inodes_free", "container_fs_inodes_total",
	"container_fs_limit_bytes", "container_fs_read_seconds_total", "container_fs_reads_merged_total",
	"container_fs_sector_reads_total", "container_fs_sector_writes_total",
	"container_fs_write_seconds_total", "container_fs_writes_merged_total",
}

// descriptors returns the descriptors of all metrics by name.
func descriptors(t *testing.T, s *Service) map[string]*runtimeapi.MetricDescriptor {
	t.Helper()
	l, err := s.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	out := map[string]*runtimeapi.MetricDescriptor{}
	for _, d := range l.Descriptors {
		if out[d.Name] != nil || d.Help == "" {
			t.Errorf("%s is duplicate or has no help text", d.Name)
		}
		out[d.Name] = d
	}

	return out
}

func TestMetricDescriptors(t *testing.T) {
	s, w := newService(t)
	w.engine.SetDown(true)
	eventually(t, func() bool { return !s.View.Engine().Ready })
	all := descriptors(t, s) // the kubelet asks only once, when it starts
	for _, name := range append(slices.Clone(nodeTest), nodeTestOfNode...) {
		if all[name] == nil {
			t.Errorf("no %s", name)
		}
	}

	if got := all["container_network_receive_bytes_total"].LabelKeys; !slices.Equal(got,
		[]string{"container", "id", "image", "name", "namespace", "pod", "interface"}) {
		t.Errorf("labels of a network: %v", got)
	}
}

// withLayer gives a container a measured writable layer.
func withLayer(s *Service, id string) {
	reporter(s).ImageFS = fixedFS{imagefs.Measurement{
		At:           time.Unix(2, 0),
		ContainerDir: "/data",
		Writable:     map[model.ContainerID]imagefs.Usage{model.ContainerID(id): {Bytes: 50, Inodes: 6}},
	}}
}

// reporter returns the reporter of a service, so that tests can replace its sources.
func reporter(s *Service) *podstats.Reporter {
	r, _ := s.Stats.(*podstats.Reporter) //nolint:errcheck // newServiceWith has set it
	return r
}

// scrape returns Prometheus' metrics of a service's containers.
func scrape(t *testing.T, s *Service) []*dto.MetricFamily {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(reporter(s).Collector())
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}

	return families
}

func TestPodSandboxMetrics(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := runContainer(t, s, pod, cfg)
	withLayer(s, id)
	l, err := received(s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{}))
	if err != nil || len(l.PodMetrics) != 1 || l.PodMetrics[0].PodSandboxId != pod ||
		len(l.PodMetrics[0].ContainerMetrics) != 1 || l.PodMetrics[0].ContainerMetrics[0].ContainerId != id {
		t.Fatalf("list: %v, %v", l, err)
	}

	known := descriptors(t, s)
	p := l.PodMetrics[0]
	for _, m := range append(slices.Clone(p.Metrics), p.ContainerMetrics[0].Metrics...) {
		if d := known[m.Name]; d == nil || len(d.LabelKeys) != len(m.LabelValues) {
			t.Errorf("%v does not fit its descriptor %v", m, d)
		}
	}

	sb, c := s.View.Sandboxes()[0], s.View.Containers()[0]
	node := []string{"", "/", "", "", "", "", "/dev/sda1"}
	whole := []string{"", "/kubepods/pod", "", "", "default", cfg.Metadata.Name}
	network := []string{"POD", "/kubepods/pod/" + pod, sb.Image, sb.Name, "default", cfg.Metadata.Name}
	own := []string{"main", "/kubepods/pod/" + id, testImage, c.Name, "default", cfg.Metadata.Name}
	counter, gauge := runtimeapi.MetricType_COUNTER, runtimeapi.MetricType_GAUGE
	for _, want := range []struct {
		in     []*runtimeapi.Metric
		name   string
		kind   runtimeapi.MetricType
		value  uint64
		at     int64
		labels []string
	}{
		{p.Metrics, "container_cpu_usage_seconds_total", counter, 2, 0, append(slices.Clone(whole), "total")},
		{p.Metrics, "container_network_receive_packets_dropped_total", counter, 5, 0,
			append(slices.Clone(network), "eth0")},
		{p.Metrics, "container_network_transmit_packets_total", counter, 0, 0, append(slices.Clone(network), "net1")},
		{p.Metrics, "container_fs_usage_bytes", gauge, 1 << 20, 0, node},
		{p.Metrics, "container_fs_inodes_free", gauge, 900, 0, node},
		{p.Metrics, "container_fs_reads_total", counter, 3, 0, node},
		{p.Metrics, "container_fs_reads_bytes_total", counter, 1024, 0, node},
		{p.Metrics, "container_fs_write_seconds_total", counter, 2, 0, node},
		{p.ContainerMetrics[0].Metrics, "container_memory_working_set_bytes", gauge, 200, 0, own},
		{p.ContainerMetrics[0].Metrics, "container_cpu_user_seconds_total", counter, 1, 0, own},
		{p.ContainerMetrics[0].Metrics, "container_cpu_cfs_throttled_seconds_total", counter, 2, 0, own},
		{p.ContainerMetrics[0].Metrics, "container_memory_failures_total", counter, 6, 0,
			append(slices.Clone(own), "pgfault", "container")},
		{p.ContainerMetrics[0].Metrics, "container_blkio_device_usage_total", counter, 8192, 0,
			append(slices.Clone(own), "/dev/8-0", "8", "0", "Write")},
		{p.ContainerMetrics[0].Metrics, "container_hugetlb_failcnt", counter, 1, 0, append(slices.Clone(own), "2MB")},
		{p.ContainerMetrics[0].Metrics, "container_fs_usage_bytes", gauge, 50, time.Unix(2, 0).UnixNano(),
			append(slices.Clone(own), "/dev/sda1")},
		{p.ContainerMetrics[0].Metrics, "container_log_usage_bytes", gauge, 4096, 0, own},
		{p.ContainerMetrics[0].Metrics, "container_sockets", gauge, 4, 0, own},
		{p.ContainerMetrics[0].Metrics, "container_threads_max", gauge, 0, 0, own},
	} {
		m := &runtimeapi.Metric{
			Name:        want.name,
			MetricType:  want.kind,
			Timestamp:   want.at,
			LabelValues: want.labels,
			Value:       number64(want.value),
		}
		if !slices.ContainsFunc(want.in, func(got *runtimeapi.Metric) bool {
			return cmp.Diff(m, got, protocmp.Transform()) == ""
		}) {
			t.Errorf("no %v", m)
		}
	}

	checkUnmeasured(t, append(slices.Clone(p.Metrics), p.ContainerMetrics[0].Metrics...))
	checkCPUSeconds(t, s)
}

// checkUnmeasured checks that metrics without a value from the kernel are omitted.
func checkUnmeasured(t *testing.T, all []*runtimeapi.Metric) {
	t.Helper()
	unmeasured := []string{
		"container_memory_max_usage_bytes", "container_hugetlb_max_usage_bytes",
		"container_oom_events_total", "container_pressure_cpu_waiting_seconds_total",
	}

	for _, m := range all {
		if slices.Contains(unmeasured, m.Name) {
			t.Errorf("metric without a value from the kernel: %v", m)
		}
	}
}

// checkCPUSeconds checks the fractions of seconds in Prometheus' metrics.
func checkCPUSeconds(t *testing.T, s *Service) {
	t.Helper()
	var seconds []float64
	for _, f := range scrape(t, s) {
		if f.GetName() == "container_cpu_usage_seconds_total" {
			for _, m := range f.GetMetric() {
				seconds = append(seconds, m.GetCounter().GetValue())
			}
		}
	}

	if !slices.Equal(seconds, []float64{2.5, 2.5}) {
		t.Errorf("CPU seconds of the pod and the container: %v", seconds)
	}
}

// TestNodeMetrics: metrics of the node are reported once, with any pod.
func TestNodeMetrics(t *testing.T) {
	s, w := newService(t)
	for range 3 {
		cfg := w.pod()
		withLayer(s, runContainer(t, s, runPod(t, s, cfg), cfg))
	}

	l, err := received(s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{}))
	if err != nil {
		t.Fatal(err)
	}

	reported := map[string]int{}
	for _, p := range l.PodMetrics {
		for _, m := range p.Metrics {
			if m.LabelValues[1] == "/" {
				reported[m.Name]++
			}
		}
	}

	onPage := map[string]int{}
	for _, f := range scrape(t, s) {
		for _, m := range f.GetMetric() {
			isNode := func(l *dto.LabelPair) bool { return l.GetName() == "id" && l.GetValue() == "/" }
			if slices.ContainsFunc(m.GetLabel(), isNode) {
				onPage[f.GetName()]++
			}
		}
	}

	for _, name := range nodeTestOfNode {
		if reported[name] != 1 || onPage[name] != 1 {
			t.Errorf("%s is reported %d times, and %d times on the page", name, reported[name], onPage[name])
		}
	}
}

// TestMetricsOfEndedPods: a pod with an ended pause container is measured in its container's
// namespace. An ended pod has no metrics, and removed pods are forgotten.
func TestMetricsOfEndedPods(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := runContainer(t, s, pod, cfg)
	list := func() []*runtimeapi.PodSandboxMetrics {
		l, err := received(s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{}))
		if err != nil {
			t.Error(err)
		}
		return l.GetPodMetrics()
	}

	w.engine.End(model.ContainerID(pod), 0)
	eventually(t, func() bool {
		l := list()
		return len(l) == 1 && slices.ContainsFunc(l[0].Metrics, func(m *runtimeapi.Metric) bool {
			return m.Name == "container_network_receive_bytes_total" && m.LabelValues[1] == "/kubepods/pod/"+id
		})
	})

	w.setFault(func(step string) error {
		if step == "stats" {
			return errBroken
		}
		return nil
	})

	if l := list(); len(l) != 1 || len(l[0].ContainerMetrics) != 0 {
		t.Errorf("metrics of unreadable pods: %v", l)
	}

	w.setFault(nil)
	w.engine.End(model.ContainerID(id), 0)
	eventually(t, func() bool { return len(list()) == 0 })
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}

	if got := keys(w, w.forgotten); len(got) != 2 || !slices.Contains(got, pod) || !slices.Contains(got, id) {
		t.Errorf("forgotten: %v", got)
	}
}

// metricsStream receives the items of StreamPodSandboxMetrics.
type metricsStream struct {
	runtimeapi.RuntimeService_StreamPodSandboxMetricsServer
	ctx   context.Context //nolint:containedctx // as gRPC's streams have it
	pages int
	seen  []string
}

func (s *metricsStream) Context() context.Context { return s.ctx }

func (s *metricsStream) Send(r *runtimeapi.StreamPodSandboxMetricsResponse) error {
	s.pages++
	r, err := received(r, nil)
	if err != nil {
		return err
	}

	for _, p := range r.PodSandboxMetrics {
		s.seen = append(s.seen, p.PodSandboxId)
	}

	return nil
}

// TestNoStatsAskTheEngine: no call for stats or metrics, with any result, makes a request to the
// engine.
func TestNoStatsAskTheEngine(t *testing.T) {
	s, w := newService(t)
	var pods []string
	for range 100 {
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		runContainer(t, s, pod, cfg)
		pods = append(pods, pod)
	}

	id := s.View.Containers()[0].ID
	withLayer(s, string(id))
	var asked []string
	w.setFault(func(step string) error {
		if step != "stats" {
			asked = append(asked, step)
		}
		return nil
	})

	out := &metricsStream{ctx: t.Context()}
	_, err1 := s.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: string(id)})
	_, err2 := s.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
	_, err3 := s.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pods[0]})
	_, err4 := s.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	_, err5 := s.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	_, err6 := s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	err7 := s.StreamPodSandboxMetrics(&runtimeapi.StreamPodSandboxMetricsRequest{}, out)
	samples := 0
	for _, f := range scrape(t, s) {
		samples += len(f.GetMetric())
	}

	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7} {
		if err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}

	w.setFault(nil)
	if len(asked) != 0 || samples < 100*30 {
		t.Errorf("requests to the engine: %v; %d samples", asked, samples)
	}

	slices.Sort(pods)
	slices.Sort(out.seen)
	if !slices.Equal(pods, out.seen) || out.pages < 2 {
		t.Errorf("%d pods streamed in %d pages, want %d in more than one", len(out.seen), out.pages, len(pods))
	}
}

// TestFirstScrape: a just started container has all disk and thread metrics before the first
// background measurement, even with an unknown layout of the engine's store.
func TestFirstScrape(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	id := runContainer(t, s, runPod(t, s, cfg), cfg)
	store := &lateFS{walked: imagefs.Usage{Bytes: 70, Inodes: 3}}
	reporter(s).ImageFS = store
	names := func() map[string]bool {
		l, err := received(s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{}))
		if err != nil {
			t.Fatal(err)
		}

		out := map[string]bool{}
		for _, p := range l.PodMetrics {
			for _, m := range append(slices.Clone(p.Metrics), p.ContainerMetrics[0].Metrics...) {
				out[m.Name] = true
			}
		}

		return out
	}

	all := names()
	for name := range descriptors(t, s) {
		if (strings.HasPrefix(name, "container_fs_") || name == "container_threads_max") && !all[name] {
			t.Errorf("no %s", name)
		}
	}

	if !slices.Equal(store.asked, []model.ContainerID{model.ContainerID(id)}) {
		t.Errorf("measured: %v", store.asked)
	}

	store.unknown = true
	all = names()
	for _, name := range nodeTestOfNode {
		if !all[name] {
			t.Errorf("with an unknown store: no %s", name)
		}
	}
}

// lateFS has no measurement yet, and measures on request.
type lateFS struct {
	walked  imagefs.Usage
	unknown bool
	asked   []model.ContainerID
}

func (*lateFS) Read(imagefs.Store) (imagefs.Measurement, bool) { return imagefs.Measurement{}, false }

func (f *lateFS) Complete(_ imagefs.Store, containers []model.ContainerID) (imagefs.Measurement, bool) {
	if f.unknown {
		return imagefs.Measurement{}, false
	}

	f.asked = containers
	out := imagefs.Measurement{
		At:           time.Unix(2, 0),
		ContainerDir: "/data",
		Writable:     map[model.ContainerID]imagefs.Usage{},
	}

	for _, id := range containers {
		out.Writable[id] = f.walked
	}

	return out, true
}

// TestLogUsage: a container without a log path has a log usage of 0, as every container has the
// metric.
func TestLogUsage(t *testing.T) {
	for path, want := range map[string]uint64{"main.log": 4096, "": 0} {
		t.Run(fmt.Sprintf("log path %q", path), func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			r := createRequest(runPod(t, s, cfg), cfg)
			r.Config.LogPath = path
			c, err := s.CreateContainer(t.Context(), r)
			if err == nil {
				_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
			}

			if err != nil {
				t.Fatal(err)
			}

			l, err := received(s.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{}))
			if err != nil || len(l.PodMetrics) != 1 || len(l.PodMetrics[0].ContainerMetrics) != 1 {
				t.Fatalf("metrics: %v, %v", l, err)
			}

			var got []uint64
			for _, m := range l.PodMetrics[0].ContainerMetrics[0].Metrics {
				if m.Name == "container_log_usage_bytes" {
					got = append(got, m.GetValue().GetValue())
				}
			}

			if !slices.Equal(got, []uint64{want}) {
				t.Errorf("log usage %v, want %d", got, want)
			}
		})
	}
}
