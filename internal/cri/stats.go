package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/podstats"
	"cri-dockerd/internal/wire"
)

// ContainerStats reports the usage of a container (CRI ContainerStats). A stopped container has
// only attributes. NotFound for an unknown ID.
func (s *Service) ContainerStats(
	_ context.Context, r *runtimeapi.ContainerStatsRequest,
) (*runtimeapi.ContainerStatsResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	stats, err := s.Stats.Container(r.GetContainerId())
	return &runtimeapi.ContainerStatsResponse{Stats: stats}, err
}

// ListContainerStats reports the usage of running containers, by filter (CRI ListContainerStats).
// It skips containers that end meanwhile.
func (s *Service) ListContainerStats(
	_ context.Context, r *runtimeapi.ListContainerStatsRequest,
) (*runtimeapi.ListContainerStatsResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	return &runtimeapi.ListContainerStatsResponse{Stats: s.Stats.Containers(r.GetFilter())}, nil
}

// PodSandboxStats reports the usage of a pod and of each of its running containers (CRI
// PodSandboxStats). NotFound for an unknown ID, FailedPrecondition if nothing of the pod is
// running.
func (s *Service) PodSandboxStats(
	_ context.Context, r *runtimeapi.PodSandboxStatsRequest,
) (*runtimeapi.PodSandboxStatsResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	stats, err := s.Stats.Pod(r.GetPodSandboxId())
	return &runtimeapi.PodSandboxStatsResponse{Stats: stats}, err
}

// ListPodSandboxStats reports the usage of running pods, by filter (CRI ListPodSandboxStats). It
// skips pods that end meanwhile.
func (s *Service) ListPodSandboxStats(
	_ context.Context, r *runtimeapi.ListPodSandboxStatsRequest,
) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: s.Stats.Pods(r.GetFilter())}, nil
}

// ListMetricDescriptors describes all metrics (CRI ListMetricDescriptors, KEP-2371). The
// descriptors are constant, so it works while the engine is down: the kubelet asks only once.
func (s *Service) ListMetricDescriptors(
	_ context.Context, r *runtimeapi.ListMetricDescriptorsRequest,
) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return &runtimeapi.ListMetricDescriptorsResponse{Descriptors: podstats.MetricDescriptors()}, nil
}

// ListPodSandboxMetrics reports the metrics of all running pods (CRI ListPodSandboxMetrics,
// KEP-2371). The items are already encoded; see package wire.
func (s *Service) ListPodSandboxMetrics(
	_ context.Context, r *runtimeapi.ListPodSandboxMetricsRequest,
) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	return wire.WithEncoded(&runtimeapi.ListPodSandboxMetricsResponse{}, s.Stats.Metrics()), nil
}
