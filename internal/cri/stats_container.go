package cri

import (
	"context"
	"fmt"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

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
	f, _ := s.ImageFS.Read(storeOf(host))
	return f
}

func storeOf(host spec.Host) imagefs.Store {
	return imagefs.Store{Driver: host.StorageDriver, Root: host.RootDir, Containerd: host.ContainerdStore}
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
		out.WritableLayer = newFilesystemUsage(l.At, l.ContainerDir, w.Bytes, &w.Inodes)
	}
	return out, nil
}
