package cri

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
)

// fakeStats reports the same usage for every running process of the fake engine.
type fakeStats struct {
	*world
	without bool // without the pod's interface
}

func number(n uint64) *uint64 { return &n }

func number64(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func (f fakeStats) Container(_ string, pid int) (stats.Usage, error) {
	if pid == 0 {
		return stats.Usage{}, errdefs.ErrNotFound
	}

	u := stats.Usage{NanoCores: number(5), Usage: cgroup.Usage{
		At:  time.Unix(1, 0),
		CPU: 100,
		Memory: cgroup.Memory{
			Usage:       300,
			WorkingSet:  200,
			RSS:         150,
			Limit:       number(1000),
			Faults:      7,
			MajorFaults: 1,
		},
		Swap:       &cgroup.Swap{Usage: 9},
		IOPressure: &cgroup.Pressure{Some: cgroup.Stall{Avg10: 1, Total: time.Microsecond}},
	}}

	return u, f.fails("stats")
}

func (f fakeStats) ContainerDetails(id string, pid int) (stats.Details, error) {
	u, err := f.Container(id, pid)
	u.CPU = 2_500_000_000

	return stats.Details{
		Path: "/kubepods/pod/" + id,
		Details: cgroup.Details{
			Usage:      u.Usage,
			User:       1_500_000_000,
			Throttling: &cgroup.Throttling{Periods: 4, Throttled: 3, Time: 2_000_000_000},
			OwnFaults:  6,
			Threads:    number(3),
			Devices:    []cgroup.Device{{Major: 8, ReadBytes: 4096, WriteBytes: 8192, Reads: 1, Writes: 2}},
		},
		HugePages: []cgroup.HugePages{{Size: "2MB", Usage: 1 << 21, LimitHits: number(1)}},
	}, err
}

func (fakeStats) Pod(string, int, string) (stats.Usage, error) {
	return stats.Usage{}, stats.ErrNoPodGroup
}

func (f fakeStats) PodDetails(id string, pid int, uid string) (stats.Details, error) {
	if uid == "" {
		return stats.Details{}, stats.ErrNoPodGroup
	}
	d, err := f.ContainerDetails(id, pid)
	d.Path = "/kubepods/pod"
	d.Devices = nil // no I/O yet
	return d, err
}

func (fakeStats) Path(id string, _ int) string            { return "/kubepods/pod/" + id }
func (f fakeStats) Processes(string, int) (uint64, error) { return 2, f.fails("stats") }
func (fakeStats) LogBytes(string, string) (uint64, error) { return 4096, nil }
func (f fakeStats) Forget(id string)                      { f.set(f.forgotten, id, true) }

func (fakeStats) Descriptors(string, int) (stats.Processes, error) {
	return stats.Processes{Count: 2, Files: number(12), Sockets: number(4), MaxFiles: number(1024)}, nil
}

func (f fakeStats) Network(_ string, pid, _ int) ([]stats.Interface, error) {
	if pid == 0 {
		return nil, errors.New("network of no process")
	}
	if f.without {
		return []stats.Interface{{Name: "net1"}}, nil
	}

	return []stats.Interface{{
		Name:      "eth0",
		RxBytes:   1,
		RxErrors:  2,
		TxBytes:   3,
		TxErrors:  4,
		RxDropped: 5,
		TxPackets: 6,
	}, {Name: "net1"}}, nil
}

func (fakeStats) FileSystem(string) (stats.FileSystem, error) {
	return stats.FileSystem{
		Device:     "/dev/sda1",
		Bytes:      1 << 30,
		Used:       1 << 20,
		Inodes:     1000,
		InodesFree: 900,
		Disk:       &stats.Disk{Reads: 3, SectorsRead: 2, WriteTime: 2500 * time.Millisecond},
	}, nil
}

func (fakeStats) Device(major, minor uint32) string { return fmt.Sprintf("/dev/%d-%d", major, minor) }

// fixedFS returns one fixed measurement.
type fixedFS struct{ imagefs.Measurement }

func (f fixedFS) Read(imagefs.Store) (imagefs.Measurement, bool) { return f.Measurement, true }

func (f fixedFS) Complete(imagefs.Store, []model.ContainerID) (imagefs.Measurement, bool) {
	return f.Measurement, true
}

// runContainer runs a container in a pod and returns its ID.
func runContainer(t *testing.T, s *Service, pod string, cfg *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err == nil {
		_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	}

	if err != nil {
		t.Fatal(err)
	}

	return c.ContainerId
}

func TestContainerStats(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := runContainer(t, s, pod, cfg)
	reporter(s).ImageFS = fixedFS{imagefs.Measurement{
		At:           time.Unix(2, 0),
		ContainerDir: "/data",
		Writable:     map[model.ContainerID]imagefs.Usage{model.ContainerID(id): {Bytes: 50, Inodes: 6}},
	}}

	r, err := received(s.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id}))
	if err != nil {
		t.Fatal(err)
	}

	at := time.Unix(1, 0).UnixNano()
	want := &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{Id: id, Metadata: &runtimeapi.ContainerMetadata{Name: "main"}},
		Cpu: &runtimeapi.CpuUsage{
			Timestamp:            at,
			UsageCoreNanoSeconds: number64(100),
			UsageNanoCores:       number64(5),
		},
		Memory: &runtimeapi.MemoryUsage{
			Timestamp:       at,
			WorkingSetBytes: number64(200),
			AvailableBytes:  number64(800),
			UsageBytes:      number64(300),
			RssBytes:        number64(150),
			PageFaults:      number64(7),
			MajorPageFaults: number64(1),
		},
		Swap: &runtimeapi.SwapUsage{Timestamp: at, SwapUsageBytes: number64(9)},
		Io: &runtimeapi.IoUsage{
			Timestamp: at,
			Psi: &runtimeapi.PsiStats{
				Some: &runtimeapi.PsiData{Total: 1000, Avg10: 1},
				Full: &runtimeapi.PsiData{},
			},
		},
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp:  time.Unix(2, 0).UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: "/data"},
			UsedBytes:  number64(50),
			InodesUsed: number64(6),
		},
	}
	if diff := cmp.Diff(want, r.Stats, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	w.engine.End(model.ContainerID(id), 0)
	eventually(t, func() bool {
		l, err := received(s.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{}))
		return err == nil && len(l.Stats) == 0
	})

	if r, err := received(s.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{
		ContainerId: id,
	})); err != nil || r.Stats.Attributes.Id != id || r.Stats.Cpu != nil {
		t.Errorf("an ended container: %v, %v", r, err)
	}

	if _, err := s.ContainerStats(t.Context(),
		&runtimeapi.ContainerStatsRequest{ContainerId: "ffff"}); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown container: %v", err)
	}
}

func TestPodSandboxStats(t *testing.T) {
	s, w := newService(t)
	cfg, other := w.pod(), w.pod()
	cfg.Labels = map[string]string{"app": "web"}
	pod := runPod(t, s, cfg)
	id := runContainer(t, s, pod, cfg)
	runContainer(t, s, runPod(t, s, other), other)
	l, err := received(s.ListPodSandboxStats(t.Context(),
		&runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: cfg.Labels}}))
	if err != nil || len(l.Stats) != 1 || l.Stats[0].Attributes.Id != pod {
		t.Fatalf("list: %v, %v", l, err)
	}

	linux := l.Stats[0].Linux
	// The pod has no cgroup here: its usage is the sum of container and pause.
	if linux.Cpu.UsageCoreNanoSeconds.Value != 200 || linux.Cpu.UsageNanoCores.Value != 10 ||
		linux.Memory.WorkingSetBytes.Value != 400 || linux.Memory.AvailableBytes != nil ||
		linux.Process.ProcessCount.Value != 4 || len(linux.Containers) != 1 {
		t.Errorf("pod stats: %v", linux)
	}

	if n := linux.Network; n.DefaultInterface.GetName() != "eth0" || n.DefaultInterface.RxErrors.Value != 2 ||
		n.DefaultInterface.TxBytes.Value != 3 || len(n.Interfaces) != 2 {
		t.Errorf("network: %v", n)
	}

	if all, err := received(s.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})); err != nil ||
		len(all.Stats) != 2 {
		t.Errorf("without a filter: %v, %v", all, err)
	}

	w.engine.End(model.ContainerID(pod), 0) // the container keeps running in the pod's network
	eventually(t, func() bool {
		r, err := received(s.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod}))
		return err == nil && r.Stats.Linux.Process.ProcessCount.Value == 2 && len(r.Stats.Linux.Network.Interfaces) == 2
	})

	w.engine.End(model.ContainerID(id), 0)
	eventually(t, func() bool {
		_, err := s.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod})
		return errdefs.IsFailedPrecondition(err)
	})

	if _, err := s.PodSandboxStats(t.Context(),
		&runtimeapi.PodSandboxStatsRequest{PodSandboxId: "ffff"}); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown pod: %v", err)
	}
}

// TestStatsOfUnreadableContainer omits the one container without readable stats.
func TestStatsOfUnreadableContainer(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	runContainer(t, s, runPod(t, s, cfg), cfg)
	w.setFault(func(step string) error {
		if step == "stats" {
			return errBroken
		}
		return nil
	})

	if l, err := received(s.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})); err != nil ||
		len(l.Stats) != 0 {
		t.Errorf("list: %v, %v", l, err)
	}

	if l, err := received(s.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})); err != nil ||
		len(l.Stats) != 0 {
		t.Errorf("list: %v, %v", l, err)
	}
}

// TestStatsWithoutInterface: a pod without its interface, during teardown, has all stats except
// network stats.
func TestStatsWithoutInterface(t *testing.T) {
	s, w := newService(t)
	reporter(s).Usage = fakeStats{world: w, without: true}
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	runContainer(t, s, pod, cfg)
	one, err := received(s.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod}))
	if err != nil || one.Stats.Linux.Network != nil || one.Stats.Linux.Cpu == nil ||
		len(one.Stats.Linux.Containers) != 1 {
		t.Errorf("pod stats: %v, %v", one, err)
	}

	all, err := received(s.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{}))
	if err != nil || len(all.Stats) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
}
