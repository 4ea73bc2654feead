package cri

import (
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pageSize is how much a message of a streamed list holds, in bytes: far below gRPC's limit of 4 MiB, and few messages all the same.
const pageSize = 1 << 20

// pages sends items in messages of at most pageSize bytes, or of one item that is larger.
func pages[T proto.Message](items []T, send func(page []T) error) error {
	for len(items) > 0 {
		n, size := 1, proto.Size(items[0])
		for n < len(items) {
			if size += proto.Size(items[n]); size > pageSize {
				break
			}
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// StreamPodSandboxes is ListPodSandbox without a limit to its size (CRI StreamPodSandboxes, KEP-5825): one look at the view, in pages.
func (s *Service) StreamPodSandboxes(r *runtimeapi.StreamPodSandboxesRequest, out runtimeapi.RuntimeService_StreamPodSandboxesServer) error {
	l, err := s.ListPodSandbox(out.Context(), &runtimeapi.ListPodSandboxRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return pages(l.GetItems(), func(page []*runtimeapi.PodSandbox) error {
		return out.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: page})
	})
}

// StreamContainers is ListContainers in pages (CRI StreamContainers, KEP-5825).
func (s *Service) StreamContainers(r *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer) error {
	l, err := s.ListContainers(out.Context(), &runtimeapi.ListContainersRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return pages(l.GetContainers(), func(page []*runtimeapi.Container) error {
		return out.Send(&runtimeapi.StreamContainersResponse{Containers: page})
	})
}

// StreamImages is ListImages in pages (CRI StreamImages, KEP-5825).
func (s *Service) StreamImages(r *runtimeapi.StreamImagesRequest, out runtimeapi.ImageService_StreamImagesServer) error {
	l, err := s.ListImages(out.Context(), &runtimeapi.ListImagesRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return pages(l.GetImages(), func(page []*runtimeapi.Image) error { return out.Send(&runtimeapi.StreamImagesResponse{Images: page}) })
}

// StreamContainerStats is ListContainerStats in pages (CRI StreamContainerStats, KEP-5825).
func (s *Service) StreamContainerStats(r *runtimeapi.StreamContainerStatsRequest, out runtimeapi.RuntimeService_StreamContainerStatsServer) error {
	l, err := s.ListContainerStats(out.Context(), &runtimeapi.ListContainerStatsRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return pages(l.GetStats(), func(page []*runtimeapi.ContainerStats) error {
		return out.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: page})
	})
}

// StreamPodSandboxStats is ListPodSandboxStats in pages (CRI StreamPodSandboxStats, KEP-5825).
func (s *Service) StreamPodSandboxStats(r *runtimeapi.StreamPodSandboxStatsRequest, out runtimeapi.RuntimeService_StreamPodSandboxStatsServer) error {
	l, err := s.ListPodSandboxStats(out.Context(), &runtimeapi.ListPodSandboxStatsRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return pages(l.GetStats(), func(page []*runtimeapi.PodSandboxStats) error {
		return out.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: page})
	})
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in pages (CRI StreamPodSandboxMetrics, KEP-5825).
func (s *Service) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest, out runtimeapi.RuntimeService_StreamPodSandboxMetricsServer) error {
	l, err := s.ListPodSandboxMetrics(out.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		return err
	}
	return pages(l.GetPodMetrics(), func(page []*runtimeapi.PodSandboxMetrics) error {
		return out.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: page})
	})
}
