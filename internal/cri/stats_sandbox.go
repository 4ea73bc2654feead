package cri

import (
	"context"
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
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
)

// maxInterfaces bounds the network devices of one answer, since a pod with NET_ADMIN may create very many: each of pods
// has a fair share of 1,024, and at least 4 and at most 32.
func maxInterfaces(pods int) int { return min(max(1024/max(pods, 1), 4), 32) }

// runningPod is a pod with its containers that run. One whose pause has ended runs as long as a container does.
type runningPod struct {
	*spec.Sandbox
	containers []*spec.Container
	// A process that lives in the pod's control group and network namespace: that of the pause or, without it, of a container.
	anchor string
	pid    int
}

// runningPods are those of these pods that run, in the same order.
func (s *Service) runningPods(sandboxes []*spec.Sandbox) []runningPod {
	of := make(map[string][]*spec.Container, len(sandboxes))
	for _, c := range s.View.Containers() {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			of[string(c.SandboxID)] = append(of[string(c.SandboxID)], c)
		}
	}
	out := make([]runningPod, 0, len(sandboxes))
	for _, sb := range sandboxes {
		p := runningPod{Sandbox: sb, containers: of[string(sb.ID)], anchor: string(sb.ID), pid: sb.Pid}
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

// PodSandboxStats tells what a pod uses as a whole, and each of its running containers (CRI PodSandboxStats). NotFound for an unknown ID,
// FailedPrecondition if nothing of it runs.
func (s *Service) PodSandboxStats(_ context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	sb, err := s.View.Sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	running := s.runningPods([]*spec.Sandbox{sb})
	if len(running) == 0 {
		return nil, fmt.Errorf("sandbox %s does not run: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}
	out, err := s.podStats(running[0], s.layers(host), maxInterfaces(1))
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: out}, nil
}

// ListPodSandboxStats tells what running pods use, by filter (CRI ListPodSandboxStats). One that ends meanwhile is left out.
func (s *Service) ListPodSandboxStats(_ context.Context, r *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	filter := &runtimeapi.PodSandboxFilter{Id: r.GetFilter().GetId(), LabelSelector: r.GetFilter().GetLabelSelector()}
	var matching []*spec.Sandbox
	sandboxes := s.View.Sandboxes()
	defer s.encodedSandboxes.keep(sandboxes)
	defer s.encodedContainers.keep(s.View.Containers())
	for _, sb := range sandboxes {
		if spec.MatchSandbox(filter, sb) {
			matching = append(matching, sb)
		}
	}
	layers := s.layers(host)
	pods := s.runningPods(matching)
	all := sideBySide(pods, func(p runningPod) *runtimeapi.PodSandboxStats {
		one, err := s.podStats(p, layers, maxInterfaces(len(pods)))
		if err != nil {
			s.unreadable("sandbox", string(p.ID), err)
		}
		return one
	})
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: slices.DeleteFunc(all, func(one *runtimeapi.PodSandboxStats) bool { return one == nil })}, nil
}

// few are so many things that are not worth a second thread.
const few = 8

// sideBySide does the same with many things, on as many threads as there are, and returns what came of each in their order.
func sideBySide[T, R any](things []T, do func(T) R) []R {
	out := make([]R, len(things))
	threads := min(runtime.GOMAXPROCS(0), len(things)/few)
	var next atomic.Int64
	work := func() {
		for i := next.Add(1) - 1; int(i) < len(things); i = next.Add(1) - 1 {
			out[i] = do(things[i])
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

// podStats reads the pod's own control group or, where it has none, adds up those of its containers and its pause.
// Attributes are encoded already; see package wire.
func (s *Service) podStats(p runningPod, l imagefs.Figures, interfaces int) (*runtimeapi.PodSandboxStats, error) {
	linux := &runtimeapi.LinuxPodSandboxStats{}
	sum, err := s.Stats.Pod(p.anchor, p.pid, p.Metadata.GetUid())
	own := err == nil
	if !own && !errors.Is(err, stats.ErrNoPodGroup) {
		return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
	}
	var processes uint64
	if p.Running {
		if err := s.addPause(&sum, &processes, p, own); err != nil {
			return nil, err
		}
	}
	for _, c := range p.containers {
		u, err := s.Stats.Container(string(c.ID), c.Pid)
		n, err2 := s.Stats.Processes(string(c.ID), c.Pid)
		if err != nil || err2 != nil {
			continue // it has ended
		}
		if !own {
			sum.Add(u)
		}
		processes += n
		one, err := s.statsOf(c, u, l)
		if err != nil {
			return nil, err
		}
		linux.Containers = append(linux.Containers, one)
	}
	linux.Cpu, linux.Memory, linux.Io = cpuUsage(sum), memoryUsage(sum), ioUsage(sum)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: sum.At.UnixNano(), ProcessCount: value(processes)}
	if !p.HostNetwork() {
		if linux.Network, err = s.networkUsage(p, interfaces); err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
		}
	}
	attributes, err := s.encodedSandboxes.of(p.Sandbox, asAttributes)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", p.ID, err)
	}
	return wire.Carry(&runtimeapi.PodSandboxStats{Linux: linux}, attributes), nil
}

// addPause adds what the pause has: its processes and, where the pod has no control group of its own, what it has used.
func (s *Service) addPause(sum *stats.Usage, processes *uint64, p runningPod, own bool) error {
	n, err := s.Stats.Processes(string(p.ID), p.Pid)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", p.ID, err)
	}
	*processes += n
	if own {
		return nil
	}
	u, err := s.Stats.Container(string(p.ID), p.Pid)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", p.ID, err)
	}
	sum.Add(u)
	return nil
}

// networkUsage reads the network of a pod, nil if its default interface does not exist.
func (s *Service) networkUsage(p runningPod, interfaces int) (*runtimeapi.NetworkUsage, error) {
	now := time.Now()
	devices, err := s.Stats.Network(p.anchor, p.pid, interfaces)
	if err != nil {
		return nil, err
	}
	return newNetworkUsage(now, devices), nil
}
