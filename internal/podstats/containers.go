package podstats

import (
	"fmt"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
)

// Container reports the stats of a container. A stopped container has only attributes. NotFound for
// an unknown ID.
func (r *Reporter) Container(id string) (*runtimeapi.ContainerStats, error) {
	c, err := r.View.Container(id)
	if err != nil {
		return nil, err
	}
	return r.container(c, r.layers())
}

// Containers reports the stats of running containers, newest first. A nil filter selects every
// container. It skips containers that end meanwhile.
func (r *Reporter) Containers(f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	filter := &runtimeapi.ContainerFilter{
		Id:            f.GetId(),
		PodSandboxId:  f.GetPodSandboxId(),
		LabelSelector: f.GetLabelSelector(),
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}

	containers := r.View.Containers()
	defer r.containerAttributes.Keep(containers)

	var matching []*model.Container
	for _, c := range containers {
		if model.MatchContainer(filter, c) {
			matching = append(matching, c)
		}
	}

	layers := r.layers()
	all := inParallel(matching, func(c *model.Container) *runtimeapi.ContainerStats {
		one, err := r.container(c, layers)
		if err != nil {
			r.logUnreadable("container", string(c.ID), err)
		}
		return one
	})

	return slices.DeleteFunc(all, func(one *runtimeapi.ContainerStats) bool { return one == nil })
}

// container returns the stats of a container, running or not.
func (r *Reporter) container(c *model.Container, l imagefs.Measurement) (*runtimeapi.ContainerStats, error) {
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return &runtimeapi.ContainerStats{Attributes: c.Attributes()}, nil
	}

	u, err := r.Usage.Container(string(c.ID), c.Pid)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}

	return r.newContainerStats(c, u, l)
}

// newContainerStats returns the stats of a running container with this usage. The attributes are
// encoded already; see package wire.
func (r *Reporter) newContainerStats(
	c *model.Container, u stats.Usage, l imagefs.Measurement,
) (*runtimeapi.ContainerStats, error) {
	attributes, err := r.containerAttributes.Item(c)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}

	out := wire.WithEncoded(&runtimeapi.ContainerStats{
		Cpu:    cpuUsage(u),
		Memory: memoryUsage(u),
		Swap:   swapUsage(u),
		Io:     ioUsage(u),
	}, attributes)
	if w, known := l.Writable[c.ID]; known {
		out.WritableLayer = newFilesystemUsage(l.At, l.ContainerDir, w.Bytes, &w.Inodes)
	}

	return out, nil
}
