package cri

import (
	"math"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/wire"
)

// pageSize is the size of a message in a streamed list, in bytes. It is far below gRPC's limit of 4
// MiB, yet large enough for few messages.
const pageSize = 1 << 20

// encodeItems encodes messages as items of a list.
func encodeItems[M proto.Message](messages []M) (items []byte, err error) {
	for _, m := range messages {
		if items, err = wire.AppendItem(items, m); err != nil {
			return nil, err
		}
	}
	return items, nil
}

// StreamPodSandboxes is ListPodSandbox without a size limit (CRI StreamPodSandboxes, KEP-5825). It
// sends one snapshot of the view in pages.
func (s *Service) StreamPodSandboxes(
	r *runtimeapi.StreamPodSandboxesRequest, out runtimeapi.RuntimeService_StreamPodSandboxesServer,
) error {
	if _, err := s.host(); err != nil {
		return err
	}

	items, err := s.encodedSandboxes.items(s.Visible.Sandboxes(), matchSandbox(r.GetFilter()), math.MaxInt)
	if err != nil {
		return err
	}

	return wire.SendPages(items, pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamPodSandboxesResponse{}, page))
	})
}

// StreamContainers is ListContainers in pages (CRI StreamContainers, KEP-5825).
func (s *Service) StreamContainers(
	r *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer,
) error {
	if _, err := s.host(); err != nil {
		return err
	}

	items, err := s.encodedContainers.items(s.Visible.Containers(), matchContainer(r.GetFilter()), math.MaxInt)
	if err != nil {
		return err
	}

	return wire.SendPages(items, pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamContainersResponse{}, page))
	})
}

// StreamImages is ListImages in pages (CRI StreamImages, KEP-5825).
func (x *imageService) StreamImages(
	r *runtimeapi.StreamImagesRequest, out runtimeapi.ImageService_StreamImagesServer,
) error {
	l, err := x.listImages(out.Context(), &runtimeapi.ListImagesRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}

	items, err := encodeItems(l.GetImages())
	if err != nil {
		return err
	}

	return wire.SendPages(items, pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamImagesResponse{}, page))
	})
}

// StreamContainerStats is ListContainerStats in pages (CRI StreamContainerStats, KEP-5825).
func (s *Service) StreamContainerStats(
	r *runtimeapi.StreamContainerStatsRequest, out runtimeapi.RuntimeService_StreamContainerStatsServer,
) error {
	l, err := s.ListContainerStats(out.Context(), &runtimeapi.ListContainerStatsRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}

	items, err := encodeItems(l.GetStats())
	if err != nil {
		return err
	}

	return wire.SendPages(items, pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamContainerStatsResponse{}, page))
	})
}

// StreamPodSandboxStats is ListPodSandboxStats in pages (CRI StreamPodSandboxStats, KEP-5825).
func (s *Service) StreamPodSandboxStats(
	r *runtimeapi.StreamPodSandboxStatsRequest, out runtimeapi.RuntimeService_StreamPodSandboxStatsServer,
) error {
	l, err := s.ListPodSandboxStats(out.Context(), &runtimeapi.ListPodSandboxStatsRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}

	items, err := encodeItems(l.GetStats())
	if err != nil {
		return err
	}

	return wire.SendPages(items, pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamPodSandboxStatsResponse{}, page))
	})
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in pages (CRI StreamPodSandboxMetrics,
// KEP-5825).
func (s *Service) StreamPodSandboxMetrics(
	r *runtimeapi.StreamPodSandboxMetricsRequest, out runtimeapi.RuntimeService_StreamPodSandboxMetricsServer,
) error {
	if _, err := s.host(); err != nil {
		return err
	}
	return wire.SendPages(s.Stats.Metrics(), pageSize, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamPodSandboxMetricsResponse{}, page))
	})
}
