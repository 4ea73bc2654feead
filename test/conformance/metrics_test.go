package conformance

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criMetrics are the metrics of a container or of a pod as a whole.
type criMetrics []*runtimeapi.Metric

// value returns the value of a metric with one series, or with one series for eth0.
func (m criMetrics) value(t *testing.T, name string) uint64 {
	t.Helper()
	var found []*runtimeapi.Metric
	for _, x := range m {
		if x.Name == name && (!strings.HasPrefix(name, "container_network_") ||
			slices.Contains(x.LabelValues, "eth0")) {
			found = append(found, x)
		}
	}

	if len(found) != 1 {
		t.Errorf("metric %s has %d series, want 1", name, len(found))
		return 0
	}

	return found[0].Value.GetValue()
}

// metrics returns the metrics of a container, or with "" those of the pod as a whole.
func (n *node) metrics(t *testing.T, pod, container string) criMetrics {
	t.Helper()
	l, err := n.Runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, p := range l.PodMetrics {
		if p.PodSandboxId != pod {
			continue
		}
		if container == "" {
			return slices.DeleteFunc(p.Metrics, isOfNode)
		}

		for _, c := range p.ContainerMetrics {
			if c.ContainerId == container {
				return c.Metrics
			}
		}
	}

	t.Fatalf("no metrics of pod %s, container %q", pod, container)

	return nil
}

// isOfNode reports whether a metric describes the node. The list has these metrics with one of the
// pods.
func isOfNode(m *runtimeapi.Metric) bool { return m.LabelValues[1] == "/" }

// nodeMetrics returns the metrics of the node.
func (n *node) nodeMetrics(t *testing.T) (out criMetrics) {
	t.Helper()
	l, err := n.Runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, p := range l.PodMetrics {
		for _, m := range p.Metrics {
			if isOfNode(m) {
				out = append(out, m)
			}
		}
	}

	return out
}

// TestMetricsOfTheNode compares the metrics of the writable layers' file system and its disk with
// the kernel. They are reported once for any number of pods.
func TestMetricsOfTheNode(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		cfg, other := n.podConfig(t), n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		n.start(t, n.runPod(t, other), other, sh("sleep 1000"))
		eventually(t, "usage of the writable layer", func() bool { return n.stats(t, id).WritableLayer != nil })
		dir := n.stats(t, id).WritableLayer.FsId.Mountpoint
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}

		m := n.nodeMetrics(t)
		assertDescribed(t, n, m)
		assertMetricNear := func(name string, want uint64) {
			t.Helper()
			assertNear(t, name, &runtimeapi.UInt64Value{Value: m.value(t, name)}, want, 10)
		}
		assertMetricNear("container_fs_usage_bytes", (fs.Blocks-fs.Bfree)*uint64(fs.Bsize))
		assertMetricNear("container_fs_inodes_free", fs.Ffree)
		if m.value(t, "container_fs_limit_bytes") != fs.Blocks*uint64(fs.Bsize) ||
			m.value(t, "container_fs_inodes_total") != fs.Files {
			t.Errorf("metrics %v, statfs %+v", m, fs)
		}

		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}

		find := fmt.Sprintf("grep -E '^ *%d +%d ' /proc/diskstats || true", unix.Major(st.Dev), unix.Minor(st.Dev))
		disk := strings.Fields(n.run(t, "sh", "-c", find))
		if len(disk) == 0 {
			return // the file system has no disk
		}

		written := func() uint64 { return n.nodeMetrics(t).value(t, "container_fs_sector_writes_total") }
		before := written()
		n.run(t, "sh", "-c", "f="+dir+"/written; for how in oflag=direct conv=fsync; do "+
			"dd if=/dev/zero of=$f bs=1M count=8 $how 2>/dev/null && break; done; rm $f")
		if after := written(); after < before+8*mib/512 {
			t.Errorf("%d sectors written before a write of 8 MiB, %d after it", before, after)
		}

		for _, name := range []string{"container_fs_reads_total", "container_fs_writes_bytes_total",
			"container_fs_io_time_seconds_total", "container_fs_write_seconds_total", "container_fs_io_current",
			"container_fs_reads_merged_total"} {
			m.value(t, name)
		}
	})
}

// TestFirstScrape checks that a new container has all disk metrics and the thread limit
// immediately.
func TestFirstScrape(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		id := n.start(t, pod, cfg, sh("sleep 1000"))
		has := map[string]bool{}
		own := n.metrics(t, pod, id)
		for _, m := range append(slices.Clone(own), n.nodeMetrics(t)...) {
			has[m.Name] = true
		}

		d, err := n.Runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
		if err != nil {
			t.Fatal(err)
		}

		for _, x := range d.Descriptors {
			if strings.HasPrefix(x.Name, "container_fs_") && !has[x.Name] {
				t.Errorf("metric %s is missing", x.Name)
			}
		}

		own.value(t, "container_threads_max")
		if own.value(t, "container_fs_usage_bytes") == 0 || own.value(t, "container_fs_limit_bytes") == 0 {
			t.Errorf("file system metrics are 0: %v", own)
		}
	})
}

// TestMetrics checks that each metric matches its descriptor. The list, the stream and the daemon's
// metrics page have all metrics of a pod. A pod with a killed pause is still reported while its
// container runs.
func TestMetrics(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("pod" + cfg.Metadata.Uid)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("echo a line; sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 * mib}
		id := n.startConfig(t, pod, cfg, cc)
		eventually(t, "usage of the writable layer", func() bool { return n.stats(t, id).WritableLayer != nil })
		eventually(t, "logged line", func() bool { return n.log(t, n.containerStatus(t, id).LogPath) != "" })
		own, whole := n.metrics(t, pod, id), n.metrics(t, pod, "")
		assertDescribed(t, n, append(slices.Clone(own), whole...))
		assertLabels(t, n, cfg, pod, id, own, whole)
		if own.value(t, "container_spec_cpu_shares") != 512 || own.value(t, "container_log_usage_bytes") == 0 ||
			own.value(t, "container_oom_events_total") != 0 {
			t.Errorf("metrics of the container: %v", own)
		}

		if s := own.value(t, "container_start_time_seconds"); s+60 < uint64(time.Now().Unix()) ||
			s > uint64(time.Now().Unix()) {
			t.Errorf("container_start_time_seconds %d", s)
		}

		if strings.Contains(n.run(t, "sh", "-c",
			"cat /sys/fs/cgroup/cpu.pressure /sys/fs/cgroup/unified/cpu.pressure 2>/dev/null; true"), "some avg10") {
			own.value(t, "container_pressure_cpu_waiting_seconds_total")
		}

		var streamed []string
		type metricsStream = grpc.ServerStreamingClient[runtimeapi.StreamPodSandboxMetricsResponse]
		for _, m := range drain(t, func() (metricsStream, error) {
			return n.Runtime.StreamPodSandboxMetrics(t.Context(), &runtimeapi.StreamPodSandboxMetricsRequest{})
		}) {
			for _, p := range m.PodSandboxMetrics {
				streamed = append(streamed, p.PodSandboxId)
			}
		}

		mine := slices.DeleteFunc(streamed, func(id string) bool { return id != pod })
		if len(mine) != 1 {
			t.Errorf("streamed metrics have the pod %d times, want once", len(mine))
		}

		testMetricsWithoutPause(t, n, pod, whole)
	})
}

// assertDescribed checks that each metric matches its descriptor and is on the daemon's metrics
// page.
func assertDescribed(t *testing.T, n *node, all criMetrics) {
	t.Helper()
	d, err := n.Runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	keys := map[string][]string{}
	for _, x := range d.Descriptors {
		keys[x.Name] = x.LabelKeys
	}

	page := n.Metrics(t)
	for _, m := range all {
		labels := keys[m.Name]
		if len(labels) != len(m.LabelValues) || len(labels) == 0 {
			t.Fatalf("%v does not match the labels of its descriptor %v", m, labels)
		}

		var series []string
		for i, key := range labels {
			series = append(series, fmt.Sprintf("%s=%q", key, m.LabelValues[i]))
		}

		slices.Sort(series) // as in the Prometheus format
		if line := m.Name + "{" + strings.Join(series, ",") + "} "; !strings.Contains(page, line) {
			t.Errorf("metrics page lacks %s", line)
		}
	}
}

// assertLabels compares the labels container, id, image, name, namespace and pod with those of
// cAdvisor for Docker.
func assertLabels(t *testing.T, n *node, cfg *runtimeapi.PodSandboxConfig, pod, id string, own, whole criMetrics) {
	t.Helper()
	path := cfg.Linux.CgroupParent
	for _, m := range own {
		if l := m.LabelValues; l[0] != "main" || l[1] != n.containerGroup(cfg, id) || l[2] != n.image ||
			!strings.HasPrefix(l[3], "k8s_main_"+cfg.Metadata.Name) {
			t.Errorf("%s: labels %v", m.Name, l)
		}
	}

	for _, m := range whole {
		network := strings.HasPrefix(m.Name, "container_network_") || m.Name == "container_start_time_seconds"
		if l := m.LabelValues; network && (l[0] != "POD" || l[1] != n.containerGroup(cfg, pod) || l[2] == "" ||
			!strings.HasPrefix(l[3], "k8s_POD_")) {
			t.Errorf("%s: labels %v", m.Name, l)
		} else if !network && m.Name != "container_last_seen" &&
			(l[0] != "" || l[1] != path || l[2] != "" || l[3] != "") {
			t.Errorf("%s: labels %v", m.Name, l)
		}
	}

	for _, m := range append(slices.Clone(own), whole...) {
		if !slices.Equal(m.LabelValues[4:6], []string{cfg.Metadata.Namespace, cfg.Metadata.Name}) {
			t.Errorf("%s: labels of pod %v", m.Name, m.LabelValues[4:6])
		}
	}
}

// testMetricsWithoutPause kills the pause. The container keeps running in the pod's network.
func testMetricsWithoutPause(t *testing.T, n *node, pod string, whole criMetrics) {
	t.Helper()
	n.docker(t, "kill", pod)
	eventually(t, "NotReady pod", func() bool {
		return n.podStatus(t, pod).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
	rx := whole.value(t, "container_network_receive_bytes_total")
	if after := n.metrics(t, pod, "").value(t, "container_network_receive_bytes_total"); after < rx {
		t.Errorf("%d bytes received with the pause, %d without", rx, after)
	}

	if s := n.podStats(t, pod); s.Process.ProcessCount.GetValue() != 1 ||
		s.Network.GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("stats of a pod without its pause: %v", s)
	}
}

// TestStatsDoNotUseTheEngine counts the requests to the engine during repeated calls for stats and
// metrics.
func TestStatsDoNotUseTheEngine(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := n.own(t).Counted(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+c.Socket)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		id := n.start(t, pod, cfg, sh("sleep 1000"))
		if c.Sent() == 0 {
			t.Fatal("the proxy counts no requests")
		}

		callAll := func() {
			_, err1 := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
			_, err2 := n.Runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
			_, err3 := n.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod})
			_, err4 := n.Runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
			_, err5 := n.Runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
			_, err6 := n.Runtime.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
			for i, err := range []error{err1, err2, err3, err4, err5, err6} {
				if err != nil {
					t.Fatalf("call %d: %v", i, err)
				}
			}

			rss := regexp.MustCompile(`container_memory_rss{[^}]*pod="` + cfg.Metadata.Name)
			if page := n.Metrics(t); !rss.MatchString(page) {
				t.Fatal("metrics page lacks the container")
			}
		}
		// The daemon also sends periodic requests. One round without requests proves that the calls
		// cause none.
		if !within(20*time.Second, func() bool {
			before := c.Sent()
			for range 5 {
				callAll()
			}
			return c.Sent() == before
		}) {
			t.Error("calls for stats send requests to the engine")
		}
	})
}
