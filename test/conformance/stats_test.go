package conformance

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// stats returns the stats of a container.
func (n *node) stats(t *testing.T, id string) *runtimeapi.ContainerStats {
	t.Helper()
	r, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Stats
}

// podStats returns the stats of a pod.
func (n *node) podStats(t *testing.T, id string) *runtimeapi.LinuxPodSandboxStats {
	t.Helper()
	r, err := n.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Stats.Linux
}

// assertNear fails if a value differs from want by more than the given percentage.
func assertNear(t *testing.T, name string, got *runtimeapi.UInt64Value, want, percent uint64) {
	t.Helper()
	if g := got.GetValue(); g < want-want*percent/100 || g > want+want*percent/100 {
		t.Errorf("%s: %d, want %d ± %d %%", name, g, want, percent)
	}
}

const mib = 1 << 20

// TestStats has containers use known amounts of every resource and compares the stats with the
// kernel.
func TestStats(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("pod" + cfg.Metadata.Uid) // like the kubelet
		pod := n.runPod(t, cfg)

		t.Run("CPU", func(t *testing.T) { testCPUStats(t, n, pod, cfg) })
		t.Run("memory", func(t *testing.T) { testMemoryStats(t, n, pod, cfg) })
		t.Run("processes", func(t *testing.T) { testProcessStats(t, n, pod, cfg) })
		t.Run("writable layer", func(t *testing.T) { testLayerStats(t, n, pod, cfg) })
		t.Run("network", func(t *testing.T) { testNetworkStats(t, n, pod) })
		t.Run("lists", func(t *testing.T) { testStatsLists(t, n, pod) })

		n.removePod(t, pod)
		for _, id := range []string{pod, "0123456789abcdef"} {
			_, podErr := n.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
			_, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
			if status.Code(podErr) != codes.NotFound || status.Code(err) != codes.NotFound {
				t.Errorf("stats of unknown IDs: %v, %v, want NotFound", podErr, err)
			}
		}
	})
}

// readCgroup reads a file of a container's cgroup, of cgroup v1 (controller/file) or of v2. Cgroups
// of other tests may be removed concurrently.
func (n *node) readCgroup(t *testing.T, id, v1, v2 string) string {
	t.Helper()
	controller, file := path.Split(v1)
	return n.run(t, "sh", "-c",
		fmt.Sprintf(`if [ -e /sys/fs/cgroup/cgroup.controllers ]; then f=%s; else c=%s f=%s; fi; `+
			`cat $(find /sys/fs/cgroup/$c -type d -name '*%s*' 2>/dev/null)/$f`, v2, controller, file, id))
}

// cgroupCPUTime returns the CPU time of a container from its cgroup, in nanoseconds.
func (n *node) cgroupCPUTime(t *testing.T, id string) uint64 {
	t.Helper()
	out := n.readCgroup(t, id, "cpuacct/cpuacct.usage", "cpu.stat")
	if _, err := fmt.Sscanf(out, "usage_usec %d", new(uint64)); err == nil {
		var usec uint64
		_, _ = fmt.Sscanf(out, "usage_usec %d", &usec)
		return usec * 1000
	}

	var ns uint64
	if _, err := fmt.Sscan(out, &ns); err != nil {
		t.Fatalf("%q: %v", out, err)
	}

	return ns
}

// cgroupMemory returns the memory usage of a container from its cgroup, in bytes.
func (n *node) cgroupMemory(t *testing.T, id string) (bytes uint64) {
	t.Helper()
	if _, err := fmt.Sscan(n.readCgroup(t, id, "memory/memory.usage_in_bytes", "memory.current"), &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes
}

// testCPUStats uses a core, or the share of one that a busy machine provides. The reported CPU time
// must be between two values of the kernel, and the core usage must match two reports.
func testCPUStats(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	cc := n.containerConfig(sh("while :; do :; done"))
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000}
	id := n.startConfig(t, pod, cfg, cc)
	first := n.stats(t, id).Cpu
	var before, after, cores uint64
	last := first
	used := func() bool {
		before = n.cgroupCPUTime(t, id)
		last = n.stats(t, id).Cpu
		after = n.cgroupCPUTime(t, id)
		// Core usage is updated once per second.
		if took := last.Timestamp - first.Timestamp; took >= int64(time.Second) {
			cores = uint64(float64(last.UsageCoreNanoSeconds.Value-first.UsageCoreNanoSeconds.Value) /
				(float64(took) / 1e9))
			first = last
		}

		return before > 2e9
	}
	if !within(2*time.Minute, used) { // a busy machine may provide little
		t.Fatalf("only %d ns of CPU time in two minutes", before)
	}
	if u := last.UsageCoreNanoSeconds.GetValue(); u < before || u > after {
		t.Errorf("CPU time %d, the kernel had %d before and %d after", u, before, after)
	}

	assertNear(t, "cores", last.UsageNanoCores, cores, 1)
	if p := n.podStats(t, pod).Cpu.UsageCoreNanoSeconds.GetValue(); p < last.UsageCoreNanoSeconds.Value {
		t.Errorf("the pod used %d ns, less than %d ns of its container", p, last.UsageCoreNanoSeconds.Value)
	}

	before = n.cgroupCPUTime(t, id)
	m := n.metrics(t, pod, id)
	after = n.cgroupCPUTime(t, id)
	if s := m.value(t, "container_cpu_usage_seconds_total"); s < before/1e9 || s > after/1e9 {
		t.Errorf("container_cpu_usage_seconds_total is %d, the kernel had %d ns before and %d ns after",
			s, before, after)
	}

	user, periods := m.value(t, "container_cpu_user_seconds_total"), m.value(t, "container_cpu_cfs_periods_total")
	if user == 0 || user > after/1e9 || periods < 10 || m.value(t, "container_spec_cpu_quota") != 100000 {
		t.Errorf("%d s of user time, %d periods of the quota", user, periods)
	}

	n.stop(t, id, 0)
	if s := n.stats(t, id); s.Attributes.GetId() != id || s.Cpu != nil {
		t.Errorf("stats of an exited container: %v", s)
	}
}

// uncached creates a file without pages in the page cache. The kernel may keep pages with pending
// I/O, so the call is repeated until none remains.
func uncached(t *testing.T, file string, size int) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	_, err = f.Write(make([]byte, size))
	if err = errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}

	kept := 0
	if !within(30*time.Second, func() bool {
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		kept = cached(t, file, size)
		return kept == 0
	}) {
		t.Fatalf("%d pages of %s remain in the page cache", kept, file)
	}
}

// cached returns the number of pages of a file in the page cache (mincore(2)).
func cached(t *testing.T, file string, size int) (pages int) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0) // mincore requires write access
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()

	resident := make([]byte, (size+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, err := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size),
		uintptr(unsafe.Pointer(&resident[0]))); err != 0 {
		t.Fatal(err)
	}

	for _, r := range resident {
		pages += int(r & 1)
	}

	return pages
}

// largestPage returns the largest size in bytes of a page that one fault provides: that of
// transparent huge pages (Documentation/admin-guide/mm/transhuge.rst), or the usual one.
func (n *node) largestPage(t *testing.T) uint64 {
	t.Helper()
	out := n.run(t, "sh", "-c", "cd /sys/kernel/mm/transparent_hugepage 2>/dev/null || exit 0; "+
		"grep -qs '\\[always\\]' enabled hugepages-*/enabled && cat hpage_pmd_size || true")
	if size, err := strconv.ParseUint(strings.TrimSpace(out), 10, 64); err == nil {
		return size
	}

	return uint64(os.Getpagesize())
}

// testMemoryStats allocates 100 MiB and reads a file of 200 MiB into the page cache, outside of the
// working set. It reads large blocks, because the kernel counts pages read twice as active. The
// kernel may reclaim cache pages, so the test queries their number, and allows a tenth to be
// charged to other cgroups.
func testMemoryStats(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	dir := n.tempDir(t)
	file, size := filepath.Join(dir, "file"), 200*mib
	uncached(t, file, size)
	cc := n.containerConfig(sh(`dd if=/data/file of=/dev/null bs=64M 2>/dev/null; ` +
		`x=$(dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\0' x); echo held; sleep 1000; echo "$x" >&2`))
	cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/data", Readonly: true}}
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 30}
	id := n.startConfig(t, pod, cfg, cc)
	var m *runtimeapi.MemoryUsage
	log := n.containerStatus(t, id).LogPath
	held := func() bool { return strings.Contains(n.log(t, log), "held") }
	if !within(time.Minute, held) {
		t.Fatalf("memory was not allocated and read within a minute: %v", n.stats(t, id).Memory)
	}

	var cache uint64
	// The kernel sums the per-processor counters every two seconds.
	counted := func() bool {
		cache = uint64(cached(t, file, size) * os.Getpagesize())
		m = n.stats(t, id).Memory
		return m.RssBytes.GetValue() >= 100*mib && m.UsageBytes.GetValue() >= 100*mib+cache*90/100
	}
	if !within(30*time.Second, counted) || cache < 100*mib {
		t.Fatalf("memory with %d cached bytes of the file: %v", cache, m)
	}
	if ws := m.WorkingSetBytes.Value; ws < m.RssBytes.Value || ws > m.UsageBytes.Value-cache*90/100 {
		t.Errorf("working set without %d cached bytes of the file: %v", cache, m)
	}

	assertNear(t, "available", m.AvailableBytes, 1<<30-m.WorkingSetBytes.Value, 1)
	if m.PageFaults.GetValue() < 100*mib/n.largestPage(t) {
		t.Errorf("page faults: %v", m)
	}

	var p, c *runtimeapi.MemoryUsage
	// The kernel updates the pod's sum later, and the container may free memory meanwhile.
	together := func() bool {
		c, p = n.stats(t, id).Memory, n.podStats(t, pod).Memory
		return p.RssBytes.GetValue()+mib >= c.RssBytes.GetValue()
	}
	if !within(30*time.Second, together) {
		t.Errorf("memory of the pod %v, of its container %v", p, c)
	}

	before := n.cgroupMemory(t, id)
	x := n.metrics(t, pod, id)
	after := n.cgroupMemory(t, id)
	usage, rss := x.value(t, "container_memory_usage_bytes"), x.value(t, "container_memory_rss")
	if usage < min(before, after)*95/100 || usage > max(before, after)*105/100 { // the kernel charges in batches
		t.Errorf("container_memory_usage_bytes is %d, the kernel had %d before and %d after", usage, before, after)
	}

	for name, want := range map[string]uint64{
		"container_memory_rss":               m.RssBytes.Value,
		"container_memory_working_set_bytes": usage - x.value(t, "container_memory_total_inactive_file_bytes"),
		"container_memory_cache":             usage - rss,
		"container_spec_memory_limit_bytes":  1 << 30,
	} {
		assertNear(t, name, &runtimeapi.UInt64Value{Value: x.value(t, name)}, want, 5)
	}

	n.stop(t, id, 0)
}

// testProcessStats runs 51 processes.
func testProcessStats(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	before := n.podStats(t, pod).Process.ProcessCount.GetValue()
	id := n.start(t, pod, cfg, sh("for i in $(seq 50); do sleep 1000 & done; wait"))
	want := before + 51
	var got uint64
	if !within(20*time.Second, func() bool {
		got = n.podStats(t, pod).Process.ProcessCount.GetValue()
		return got == want
	}) {
		t.Errorf("%d processes, want %d", got, want)
	}

	var processes, threads, files uint64
	// A background process of the shell closes its standard input and opens /dev/null in its place:
	// for a moment, it has two descriptors.
	if !within(20*time.Second, func() bool {
		m := n.metrics(t, pod, id)
		processes, threads = m.value(t, "container_processes"), m.value(t, "container_threads")
		files = m.value(t, "container_file_descriptors")
		return processes == 51 && threads == 51 && files >= 51*3
	}) {
		t.Errorf("%d processes, %d threads, %d descriptors", processes, threads, files)
	}

	n.stop(t, id, 0)
}

// testLayerStats writes 50 MiB and a thousand files.
func testLayerStats(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	id := n.start(t, pod, cfg,
		sh("mkdir /d; for i in $(seq 1000); do echo > /d/$i; done; "+
			"dd if=/dev/zero of=/d/large bs=1M count=50 2>/dev/null; sync; sleep 1000"))
	var w *runtimeapi.FilesystemUsage
	measured := func() bool {
		w = n.stats(t, id).WritableLayer
		return w.GetUsedBytes().GetValue() >= 50*mib && w.GetInodesUsed().GetValue() >= 1000
	}
	if !within(90*time.Second, measured) {
		t.Fatalf("writable layer: %v", w)
	}

	assertNear(t, "bytes", w.UsedBytes, 54*mib, 10) // one block per file
	assertNear(t, "inodes", w.InodesUsed, 1002, 5)
	fs, err := n.Image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || fs.ContainerFilesystems[0].FsId.GetMountpoint() != w.FsId.GetMountpoint() {
		t.Errorf("file system %v, ImageFsInfo: %v, %v", w.FsId, fs, err)
	}

	m := n.metrics(t, pod, id)
	assertNear(t, "container_fs_usage_bytes", &runtimeapi.UInt64Value{Value: m.value(t, "container_fs_usage_bytes")},
		w.UsedBytes.Value, 5)
	if m.value(t, "container_fs_limit_bytes") <= w.UsedBytes.Value {
		t.Errorf("size of the file system is less than its usage: %v", m)
	}

	n.stop(t, id, 0)
}

// testNetworkStats sends 10 MiB from the node to the pod and back. The counters also include
// headers.
func testNetworkStats(t *testing.T, n *node, pod string) {
	before := n.podStats(t, pod).Network.GetDefaultInterface()
	if before.GetName() != "eth0" {
		t.Fatalf("default interface %v, want eth0", before)
	}

	var l net.Listener
	if err := engines.In(n.own(t).NetNS(n.Pin(t, pod)), func() (err error) {
		l, err = net.Listen("tcp", ":9000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	go func() {
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			_, _ = conn.Write(make([]byte, 10*mib))
			conn.Close()
		}
	}()

	conn, err := engines.Dial(t.Context(), n.own(t).NetNS(""), "tcp", n.podStatus(t, pod).Network.Ip+":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	if _, err := conn.Write(make([]byte, 10*mib)); err != nil {
		t.Fatal(err)
	}

	_ = conn.(*net.TCPConn).CloseWrite()
	if got, err := io.Copy(io.Discard, conn); got != 10*mib || err != nil {
		t.Fatalf("received %d bytes, %v", got, err)
	}

	after := n.podStats(t, pod).Network.GetDefaultInterface()
	assertNear(t, "received", &runtimeapi.UInt64Value{Value: after.RxBytes.Value - before.RxBytes.Value}, 10*mib, 10)
	assertNear(t, "sent", &runtimeapi.UInt64Value{Value: after.TxBytes.Value - before.TxBytes.Value}, 10*mib, 10)
	if after.RxErrors.GetValue() != 0 {
		t.Errorf("receive errors: %v", after)
	}

	m := n.metrics(t, pod, "")
	rx := m.value(t, "container_network_receive_bytes_total")
	packets := m.value(t, "container_network_receive_packets_total")
	if rx < after.RxBytes.Value || packets < 100 || packets > rx/50 {
		t.Errorf("received %d bytes in %d packets", rx, packets)
	}
}

// testStatsLists checks the lists and streams.
func testStatsLists(t *testing.T, n *node, pod string) {
	cfg := n.podConfig(t)
	cfg.Labels = map[string]string{"app": "lists"}
	other := n.runPod(t, cfg)
	var ids []string
	for i := range 3 {
		ids = append(ids, n.startNamed(t, other, cfg, fmt.Sprintf("c%d", i), sh("sleep 1000")))
	}

	filter := &runtimeapi.ContainerStatsFilter{PodSandboxId: other}
	l, err := n.Runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{Filter: filter})
	if err != nil || len(l.Stats) != len(ids) {
		t.Errorf("ListContainerStats: %v, %v", l, err)
	}

	stream, err := n.Runtime.StreamContainerStats(t.Context(), &runtimeapi.StreamContainerStatsRequest{Filter: filter})
	if err != nil {
		t.Fatal(err)
	}

	var streamed int
	for {
		r, err := stream.Recv()
		if err == io.EOF { //nolint:errorlint // gRPC returns io.EOF itself
			break
		} else if err != nil {
			t.Fatal(err)
		}
		streamed += len(r.ContainerStats)
	}

	if streamed != len(ids) {
		t.Errorf("%d containers streamed, want %d", streamed, len(ids))
	}

	pods, err := n.Runtime.ListPodSandboxStats(t.Context(),
		&runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: cfg.Labels}})
	if err != nil || len(pods.Stats) != 1 || pods.Stats[0].Attributes.Id != other ||
		len(pods.Stats[0].Linux.Containers) != len(ids) {
		t.Errorf("ListPodSandboxStats by label: %v, %v", pods, err)
	}

	one, err := n.Runtime.ListPodSandboxStats(t.Context(),
		&runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: pod}})
	if err != nil || len(one.Stats) != 1 || one.Stats[0].Attributes.Id != pod {
		t.Errorf("ListPodSandboxStats by ID: %v, %v", one, err)
	}

	n.removePod(t, other)
}
