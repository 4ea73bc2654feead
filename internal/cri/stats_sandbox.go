package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
)

// defaultInterface is the pod's own in every network (CNI's CNI_IFNAME as we give it).
const defaultInterface = "eth0"

// PodSandboxStats tells what a pod uses as a whole, and each of its running containers (CRI PodSandboxStats). NotFound for an unknown ID,
// FailedPrecondition if it does not run.
func (s *Service) PodSandboxStats(_ context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	sb, err := s.View.Sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !sb.Running {
		return nil, fmt.Errorf("sandbox %s does not run: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}
	out, err := s.podStats(sb, s.layers(host))
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
	filter := &runtimeapi.PodSandboxFilter{
		Id: r.GetFilter().GetId(), LabelSelector: r.GetFilter().GetLabelSelector(), State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}
	resp, layers := &runtimeapi.ListPodSandboxStatsResponse{}, s.layers(host)
	for _, sb := range s.View.Sandboxes() {
		if !spec.MatchSandbox(filter, sb) {
			continue
		}
		if one, err := s.podStats(sb, layers); err == nil {
			resp.Stats = append(resp.Stats, one)
		} else if !errdefs.IsNotFound(err) {
			s.Log.Debug("a pod's figures cannot be read", "sandbox", sb.ID, "err", err)
		}
	}
	return resp, nil
}

// podStats reads the pod's own control group or, where it has none, adds up those of its containers and its pause.
func (s *Service) podStats(sb *spec.Sandbox, l layers) (*runtimeapi.PodSandboxStats, error) {
	linux := &runtimeapi.LinuxPodSandboxStats{}
	var sum stats.Usage
	pause, err := s.Stats.Container(sb.ID, sb.Pid)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", sb.ID, err)
	}
	sum.Add(pause)
	for _, c := range s.View.ContainersOf(sb.ID) {
		if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		u, err := s.Stats.Container(c.ID, c.Pid)
		if err != nil {
			continue // it has ended
		}
		sum.Add(u)
		linux.Containers = append(linux.Containers, s.statsOf(c, u, l))
	}
	switch u, err := s.Stats.Pod(sb.ID, sb.Pid, sb.Metadata.GetUid()); {
	case err == nil:
		sum = u
	case !errors.Is(err, stats.ErrNoPodGroup):
		return nil, fmt.Errorf("sandbox %s: %w", sb.ID, err)
	}
	linux.Cpu, linux.Memory, linux.Io = cpuUsage(sum), memoryUsage(sum), ioUsage(sum)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: sum.At.UnixNano(), ProcessCount: value(sum.Processes)}
	if !sb.HostNetwork() {
		if linux.Network, err = s.networkUsage(sb); err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", sb.ID, err)
		}
	}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{Id: sb.ID, Metadata: sb.Metadata, Labels: sb.Labels, Annotations: sb.Annotations}, Linux: linux,
	}, nil
}

func (s *Service) networkUsage(sb *spec.Sandbox) (*runtimeapi.NetworkUsage, error) {
	now := time.Now()
	devices, err := s.Stats.Network(sb.Pid)
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.NetworkUsage{Timestamp: now.UnixNano()}
	for _, d := range devices {
		i := &runtimeapi.NetworkInterfaceUsage{Name: d.Name, RxBytes: value(d.RxBytes), RxErrors: value(d.RxErrors), TxBytes: value(d.TxBytes), TxErrors: value(d.TxErrors)}
		if d.Name == defaultInterface {
			out.DefaultInterface = i
		}
		out.Interfaces = append(out.Interfaces, i)
	}
	return out, nil
}
