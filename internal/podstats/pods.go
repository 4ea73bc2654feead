package podstats

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
)

// maxInterfaces bounds the network devices in one response, since a pod with NET_ADMIN may create
// very many. Each pod gets a fair share of 1,024, and at least 4 and at most 32.
func maxInterfaces(pods int) int { return min(max(1024/max(pods, 1), 4), 32) }

// runningPod is a pod with its running containers. Without its pause container, a pod is running as
// long as one of its containers.
type runningPod struct {
	*model.Sandbox
	containers []*model.Container

	// anchor and pid identify a process in the pod's cgroup and network namespace: of the pause
	// container or, without it, of another container.
	anchor string
	pid    int
}

// runningPods returns the pods that are running, in the same order.
func (r *Reporter) runningPods(sandboxes []*model.Sandbox) []runningPod {
	of := make(map[string][]*model.Container, len(sandboxes))
	for _, c := range r.View.Containers() {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			of[string(c.SandboxID)] = append(of[string(c.SandboxID)], c)
		}
	}

	out := make([]runningPod, 0, len(sandboxes))
	for _, sb := range sandboxes {
		p := runningPod{
			Sandbox:    sb,
			containers: of[string(sb.ID)],
			anchor:     string(sb.ID),
			pid:        sb.Pid,
		}
		if !sb.Running {
			if len(p.containers) == 0 {
				continue
			}
			p.anchor, p.pid = string(p.containers[0].ID), p.containers[0].Pid
		}

		out = append(out, p)
	}

	return out
}

// Pod reports the stats of a pod and of each of its running containers. NotFound for an unknown ID,
// FailedPrecondition if neither the pause container nor another container is running.
func (r *Reporter) Pod(id string) (*runtimeapi.PodSandboxStats, error) {
	sb, err := r.View.Sandbox(id)
	if err != nil {
		return nil, err
	}

	running := r.runningPods([]*model.Sandbox{sb})
	if len(running) == 0 {
		return nil, fmt.Errorf("sandbox %s is not running: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}

	return r.pod(running[0], r.layers(), maxInterfaces(1))
}

// Pods reports the stats of running pods, newest first. A nil filter selects every pod. It skips
// pods that end meanwhile.
func (r *Reporter) Pods(f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats {
	filter := &runtimeapi.PodSandboxFilter{Id: f.GetId(), LabelSelector: f.GetLabelSelector()}
	sandboxes := r.View.Sandboxes()
	defer r.podAttributes.Keep(sandboxes)
	defer r.containerAttributes.Keep(r.View.Containers())

	var matching []*model.Sandbox
	for _, sb := range sandboxes {
		if model.MatchSandbox(filter, sb) {
			matching = append(matching, sb)
		}
	}

	layers, pods := r.layers(), r.runningPods(matching)
	all := inParallel(pods, func(p runningPod) *runtimeapi.PodSandboxStats {
		one, err := r.pod(p, layers, maxInterfaces(len(pods)))
		if err != nil {
			r.logUnreadable("sandbox", string(p.ID), err)
		}
		return one
	})

	return slices.DeleteFunc(all, func(one *runtimeapi.PodSandboxStats) bool { return one == nil })
}

// minPerThread is the number of items worth a thread.
const minPerThread = 8

// inParallel calls do for each item on up to GOMAXPROCS threads, and returns the results in the
// order of the items.
func inParallel[T, R any](items []T, do func(T) R) []R {
	out := make([]R, len(items))
	threads := min(runtime.GOMAXPROCS(0), len(items)/minPerThread)
	var next atomic.Int64
	work := func() {
		for i := next.Add(1) - 1; int(i) < len(items); i = next.Add(1) - 1 {
			out[i] = do(items[i])
		}
	}

	var others sync.WaitGroup
	for range threads - 1 {
		others.Go(work)
	}

	work()
	others.Wait()

	return out
}

// pod reads the pod's own cgroup or, without one, adds up those of its containers and its pause
// container. Attributes are already encoded; see package wire.
func (r *Reporter) pod(p runningPod, l imagefs.Measurement, interfaces int) (*runtimeapi.PodSandboxStats, error) {
	sum, err := r.Usage.Pod(p.anchor, p.pid, p.Metadata.GetUid())
	own := err == nil
	if !own && !errors.Is(err, stats.ErrNoPodGroup) {
		return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
	}

	var processes uint64
	if p.Running {
		if err := r.addPause(&sum, &processes, p, own); err != nil {
			return nil, err
		}
	}

	linux := &runtimeapi.LinuxPodSandboxStats{}
	for _, c := range p.containers {
		u, err := r.Usage.Container(string(c.ID), c.Pid)
		n, err2 := r.Usage.Processes(string(c.ID), c.Pid)
		if err != nil || err2 != nil {
			continue // the container has ended
		}

		if !own {
			sum.Add(u)
		}

		processes += n
		one, err := r.newContainerStats(c, u, l)
		if err != nil {
			return nil, err
		}

		linux.Containers = append(linux.Containers, one)
	}

	linux.Cpu, linux.Memory, linux.Io = cpuUsage(sum), memoryUsage(sum), ioUsage(sum)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: sum.At.UnixNano(), ProcessCount: value(processes)}

	if linux.Network, err = r.networkUsage(p, interfaces); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
	}

	attributes, err := r.podAttributes.Item(p.Sandbox)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
	}

	return wire.WithEncoded(&runtimeapi.PodSandboxStats{Linux: linux}, attributes), nil
}

// addPause adds the processes of the pause container and, if the pod has no cgroup of its own, its
// usage.
func (r *Reporter) addPause(sum *stats.Usage, processes *uint64, p runningPod, own bool) error {
	n, err := r.Usage.Processes(string(p.ID), p.Pid)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", p.ID, err)
	}

	*processes += n
	if own {
		return nil
	}

	u, err := r.Usage.Container(string(p.ID), p.Pid)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", p.ID, err)
	}

	sum.Add(u)

	return nil
}

// networkUsage reads the network of a pod. It returns nil for the host network, and without a
// default interface.
func (r *Reporter) networkUsage(p runningPod, interfaces int) (*runtimeapi.NetworkUsage, error) {
	if p.HostNetwork() {
		return nil, nil
	}

	now := time.Now()
	devices, err := r.Usage.Network(p.anchor, p.pid, interfaces)
	if err != nil {
		return nil, err
	}

	return newNetworkUsage(now, devices), nil
}
