package cri

import (
	"context"
	"fmt"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
)

// ContainerStats tells what a container uses, from the kernel and what was measured a moment ago in the background (CRI ContainerStats). One that
// does not run has no figures. NotFound for an unknown ID.
func (s *Service) ContainerStats(_ context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	out, err := s.containerStats(c, s.layers(host))
	return &runtimeapi.ContainerStatsResponse{Stats: out}, err
}

// ListContainerStats tells what running containers use, by filter (CRI ListContainerStats). One that ends meanwhile is left out.
func (s *Service) ListContainerStats(_ context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	f := r.GetFilter()
	filter := &runtimeapi.ContainerFilter{
		Id: f.GetId(), PodSandboxId: f.GetPodSandboxId(), LabelSelector: f.GetLabelSelector(), State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}
	var matching []*spec.Container
	containers := s.View.Containers()
	defer s.encodedContainers.keep(containers)
	for _, c := range containers {
		if spec.MatchContainer(filter, c) {
			matching = append(matching, c)
		}
	}
	layers := s.layers(host)
	all := sideBySide(matching, func(c *spec.Container) *runtimeapi.ContainerStats {
		one, err := s.containerStats(c, layers)
		if err != nil {
			s.unreadable("container", string(c.ID), err)
		}
		return one
	})
	return &runtimeapi.ListContainerStatsResponse{Stats: slices.DeleteFunc(all, func(one *runtimeapi.ContainerStats) bool { return one == nil })}, nil
}

// layers returns the writable layers as last measured.
func (s *Service) layers(host spec.Host) imagefs.Figures {
	f, _ := s.ImageFS.Read(imagefs.Store{Driver: host.StorageDriver, Root: host.RootDir, Containerd: host.ContainerdStore})
	return f
}

// containerStats are the figures of a container, whether it runs or not.
func (s *Service) containerStats(c *spec.Container, l imagefs.Figures) (*runtimeapi.ContainerStats, error) {
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return &runtimeapi.ContainerStats{Attributes: containerAttributes(c)}, nil
	}
	u, err := s.Stats.Container(string(c.ID), c.Pid)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return s.statsOf(c, u, l)
}

// statsOf are the figures of a running container that has used so much. The attributes are encoded already; see package wire.
func (s *Service) statsOf(c *spec.Container, u stats.Usage, l imagefs.Figures) (*runtimeapi.ContainerStats, error) {
	attributes, err := s.encodedContainers.of(c, asAttributes)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	out := wire.Carry(&runtimeapi.ContainerStats{Cpu: cpuUsage(u), Memory: memoryUsage(u), Swap: swapUsage(u), Io: ioUsage(u)}, attributes)
	if w, known := l.Writable[c.ID]; known {
		out.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp: l.At.UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: l.ContainerDir}, UsedBytes: value(w.Bytes), InodesUsed: value(w.Inodes),
		}
	}
	return out, nil
}

func value(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func optional(n *uint64) *runtimeapi.UInt64Value {
	if n == nil {
		return nil
	}
	return value(*n)
}

// left is what may still be used of a limit, nil without one.
func left(limit *uint64, used uint64) *runtimeapi.UInt64Value {
	if limit == nil {
		return nil
	}
	return value(*limit - min(*limit, used))
}

func cpuUsage(u stats.Usage) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{Timestamp: u.At.UnixNano(), UsageCoreNanoSeconds: value(u.CPU), UsageNanoCores: optional(u.NanoCores), Psi: psi(u.CPUPressure)}
}

func memoryUsage(u stats.Usage) *runtimeapi.MemoryUsage {
	m := u.Memory
	return &runtimeapi.MemoryUsage{
		Timestamp: u.At.UnixNano(), WorkingSetBytes: value(m.WorkingSet), AvailableBytes: left(m.Limit, m.WorkingSet), UsageBytes: value(m.Usage),
		RssBytes: value(m.RSS), PageFaults: value(m.Faults), MajorPageFaults: value(m.MajorFaults), Psi: psi(u.MemoryPressure),
	}
}

func swapUsage(u stats.Usage) *runtimeapi.SwapUsage {
	if u.Swap == nil {
		return nil
	}
	return &runtimeapi.SwapUsage{Timestamp: u.At.UnixNano(), SwapUsageBytes: value(u.Swap.Usage), SwapAvailableBytes: left(u.Swap.Limit, u.Swap.Usage)}
}

// ioUsage is the pressure alone; there is nothing else in it.
func ioUsage(u stats.Usage) *runtimeapi.IoUsage {
	if u.IOPressure == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: u.At.UnixNano(), Psi: psi(u.IOPressure)}
}

func psi(p *cgroup.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	data := func(s cgroup.Stall) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: uint64(s.Total.Nanoseconds()), Avg10: s.Avg10, Avg60: s.Avg60, Avg300: s.Avg300}
	}
	return &runtimeapi.PsiStats{Some: data(p.Some), Full: data(p.Full)}
}
