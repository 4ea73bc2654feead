package conformance

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/podnet"
	"cri-dockerd/test/engines"
)

func (n *node) stats(t *testing.T, id string) *runtimeapi.ContainerStats {
	t.Helper()
	r, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Stats
}

func (n *node) podStats(t *testing.T, id string) *runtimeapi.LinuxPodSandboxStats {
	t.Helper()
	r, err := n.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Stats.Linux
}

// near fails if a figure is not what it must be, give or take so many percent.
func near(t *testing.T, what string, got *runtimeapi.UInt64Value, want, percent uint64) {
	t.Helper()
	if g := got.GetValue(); g < want-want*percent/100 || g > want+want*percent/100 {
		t.Errorf("%s: %d, want %d ± %d %%", what, g, want, percent)
	}
}

const mib = 1 << 20

// TestStats has containers use so much of everything that the kernel counts, and compares.
func TestStats(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		t.Run("CPU", func(t *testing.T) { statsOfCPU(t, n, pod, cfg) })
		t.Run("memory", func(t *testing.T) { statsOfMemory(t, n, pod, cfg) })
		t.Run("processes", func(t *testing.T) { statsOfProcesses(t, n, pod, cfg) })
		t.Run("writable layer", func(t *testing.T) { statsOfLayer(t, n, pod, cfg) })
		t.Run("network", func(t *testing.T) { statsOfNetwork(t, n, pod) })
		t.Run("lists", func(t *testing.T) { statsInLists(t, n, pod) })
		n.removePod(t, pod)
		for _, id := range []string{pod, "0123456789abcdef"} {
			_, podErr := n.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
			_, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
			if status.Code(podErr) != codes.NotFound || status.Code(err) != codes.NotFound {
				t.Errorf("of what is not there: %v, %v", podErr, err)
			}
		}
	})
}

// statsOfCPU burns a third of a core, which even a busy machine has to give.
func statsOfCPU(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	cc := n.containerConfig(sh("while :; do :; done"))
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 30000, CpuQuota: 10000}
	id := n.startConfig(t, pod, cfg, cc)
	first := n.stats(t, id).Cpu
	var last *runtimeapi.CpuUsage
	eventually(t, "three seconds pass", func() bool { last = n.stats(t, id).Cpu; return last.Timestamp-first.Timestamp > int64(3*time.Second) })
	took := uint64(last.Timestamp - first.Timestamp)
	near(t, "CPU time", &runtimeapi.UInt64Value{Value: last.UsageCoreNanoSeconds.Value - first.UsageCoreNanoSeconds.Value}, took/3, 15)
	near(t, "cores", last.UsageNanoCores, 333333333, 25)
	if p := n.podStats(t, pod).Cpu.UsageCoreNanoSeconds.GetValue(); p < last.UsageCoreNanoSeconds.Value {
		t.Errorf("the pod used %d, less than its container with %d", p, last.UsageCoreNanoSeconds.Value)
	}
	n.stop(t, id, 0)
	if s := n.stats(t, id); s.Attributes.GetId() != id || s.Cpu != nil {
		t.Errorf("a container that has ended: %v", s)
	}
}

// uncached makes a file that is on disk alone.
func uncached(t *testing.T, file string, size int) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.Write(make([]byte, size))
	if err = errors.Join(err, f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
}

// statsOfMemory holds 50 MiB, and reads a file of 200 MiB, which is page cache and no working set: in large pieces, since the kernel counts what
// is read twice as used.
func statsOfMemory(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	dir := n.tempDir(t)
	uncached(t, filepath.Join(dir, "file"), 200*mib)
	cc := n.containerConfig(sh(`dd if=/data/file of=/dev/null bs=64M 2>/dev/null; x=$(dd if=/dev/zero bs=1M count=50 2>/dev/null | tr '\0' x); echo held; sleep 1000`))
	cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/data", Readonly: true}}
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 30}
	id := n.startConfig(t, pod, cfg, cc)
	var m *runtimeapi.MemoryUsage
	held := func() bool {
		m = n.stats(t, id).Memory
		return m.RssBytes.GetValue() >= 50*mib && m.UsageBytes.GetValue() >= 250*mib
	}
	if !within(30*time.Second, held) {
		t.Fatalf("memory: %v", m)
	}
	if ws := m.WorkingSetBytes.Value; ws < m.RssBytes.Value || ws > m.UsageBytes.Value-190*mib {
		t.Errorf("working set: %v", m)
	}
	near(t, "available", m.AvailableBytes, 1<<30-m.WorkingSetBytes.Value, 1)
	if m.PageFaults.GetValue() < 50*mib/4096 {
		t.Errorf("page faults: %v", m)
	}
	if p := n.podStats(t, pod).Memory; p.RssBytes.GetValue() < m.RssBytes.Value {
		t.Errorf("the pod: %v, its container: %v", p, m)
	}
	n.stop(t, id, 0)
}

func statsOfProcesses(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	before := n.podStats(t, pod).Process.ProcessCount.GetValue()
	id := n.start(t, pod, cfg, sh("for i in $(seq 50); do sleep 1000 & done; wait"))
	want := before + 51
	var got uint64
	if !within(20*time.Second, func() bool { got = n.podStats(t, pod).Process.ProcessCount.GetValue(); return got == want }) {
		t.Errorf("%d processes, want %d", got, want)
	}
	n.stop(t, id, 0)
}

// statsOfLayer writes 50 MiB and a thousand files.
func statsOfLayer(t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig) {
	id := n.start(t, pod, cfg, sh("mkdir /d; for i in $(seq 1000); do echo > /d/$i; done; dd if=/dev/zero of=/d/large bs=1M count=50 2>/dev/null; sync; sleep 1000"))
	var w *runtimeapi.FilesystemUsage
	measured := func() bool {
		w = n.stats(t, id).WritableLayer
		return w.GetUsedBytes().GetValue() >= 50*mib && w.GetInodesUsed().GetValue() >= 1000
	}
	if !within(90*time.Second, measured) {
		t.Fatalf("writable layer: %v", w)
	}
	near(t, "bytes", w.UsedBytes, 54*mib, 10) // a block for each file
	near(t, "inodes", w.InodesUsed, 1002, 5)
	fs, err := n.Image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || fs.ContainerFilesystems[0].FsId.GetMountpoint() != w.FsId.GetMountpoint() {
		t.Errorf("file system %v, ImageFsInfo says %v, %v", w.FsId, fs, err)
	}
	n.stop(t, id, 0)
}

// statsOfNetwork sends 10 MiB from the node to the pod, which are headers more.
func statsOfNetwork(t *testing.T, n *node, pod string) {
	before := n.podStats(t, pod).Network.GetDefaultInterface()
	if before.GetName() != "eth0" {
		t.Fatalf("network: %v", before)
	}
	var l net.Listener
	if err := engines.In(n.own(t).NetNS(n.PinDir+"/"+pod), func() (err error) { l, err = net.Listen("tcp", ":9000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
	conn, err := podnet.Dial(t.Context(), n.own(t).NetNS(""), "tcp", n.podStatus(t, pod).Network.Ip+":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(make([]byte, 10*mib)); err != nil {
		t.Fatal(err)
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	_, _ = io.Copy(io.Discard, conn) // until the pod has read all
	after := n.podStats(t, pod).Network.GetDefaultInterface()
	near(t, "received", &runtimeapi.UInt64Value{Value: after.RxBytes.Value - before.RxBytes.Value}, 10*mib, 10)
	if after.TxBytes.Value <= before.TxBytes.Value || after.RxErrors.GetValue() != 0 {
		t.Errorf("after: %v", after)
	}
}

// statsInLists compares lists and streams with the single answers.
func statsInLists(t *testing.T, n *node, pod string) {
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
		t.Errorf("%v, %v", l, err)
	}
	stream, err := n.Runtime.StreamContainerStats(t.Context(), &runtimeapi.StreamContainerStatsRequest{Filter: filter})
	if err != nil {
		t.Fatal(err)
	}
	var streamed int
	for {
		r, err := stream.Recv()
		if err == io.EOF { //nolint:errorlint // as gRPC says it
			break
		} else if err != nil {
			t.Fatal(err)
		}
		streamed += len(r.ContainerStats)
	}
	if streamed != len(ids) {
		t.Errorf("%d containers streamed", streamed)
	}
	pods, err := n.Runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: cfg.Labels}})
	if err != nil || len(pods.Stats) != 1 || pods.Stats[0].Attributes.Id != other || len(pods.Stats[0].Linux.Containers) != len(ids) {
		t.Errorf("%v, %v", pods, err)
	}
	one, err := n.Runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: pod}})
	if err != nil || len(one.Stats) != 1 || one.Stats[0].Attributes.Id != pod {
		t.Errorf("%v, %v", one, err)
	}
	n.removePod(t, other)
}
