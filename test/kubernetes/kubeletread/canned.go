package main

import (
	"context"

	"google.golang.org/protobuf/proto"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// canned is a runtime with one pod and constant responses.
type canned struct {
	internalapi.RuntimeService
	internalapi.ImageManagerService

	status       *runtimeapi.StatusResponse
	pods         *runtimeapi.ListPodSandboxResponse
	pod          *runtimeapi.PodSandboxStatusResponse
	containers   *runtimeapi.ListContainersResponse
	container    *runtimeapi.ContainerStatusResponse
	stats        *runtimeapi.ListContainerStatsResponse
	podStatsList *runtimeapi.ListPodSandboxStatsResponse
	podStats     *runtimeapi.PodSandboxStatsResponse
	descriptors  *runtimeapi.ListMetricDescriptorsResponse
	metrics      *runtimeapi.ListPodSandboxMetricsResponse
	images       *runtimeapi.ListImagesResponse
	image        *runtimeapi.ImageStatusResponse
	fs           *runtimeapi.ImageFsInfoResponse
	event        *runtimeapi.ContainerEventResponse
}

// newCanned returns a runtime with complete responses: every possible message is present.
func newCanned() *canned {
	pod := func() *runtimeapi.PodSandboxStatus {
		return &runtimeapi.PodSandboxStatus{Id: "p", Metadata: clone(podMetadata)}
	}
	container := func() *runtimeapi.ContainerStatus {
		return &runtimeapi.ContainerStatus{
			Id:       "c",
			Metadata: clone(containerMetadata),
			State:    runtimeapi.ContainerState_CONTAINER_RUNNING,
			Image:    clone(imageSpec),
			Labels:   labels,
		}
	}

	stats := func() *runtimeapi.ContainerStats {
		return &runtimeapi.ContainerStats{
			Attributes: &runtimeapi.ContainerAttributes{Id: "c", Metadata: clone(containerMetadata)},
		}
	}

	podStats := func() *runtimeapi.PodSandboxStats {
		return &runtimeapi.PodSandboxStats{
			Attributes: &runtimeapi.PodSandboxAttributes{Id: "p", Metadata: clone(podMetadata)},
			Linux:      &runtimeapi.LinuxPodSandboxStats{Containers: []*runtimeapi.ContainerStats{stats()}},
		}
	}

	metric := &runtimeapi.Metric{
		Name:       "m",
		MetricType: runtimeapi.MetricType_GAUGE,
		Value:      &runtimeapi.UInt64Value{Value: 1},
	}

	conditions := []*runtimeapi.RuntimeCondition{{Type: runtimeapi.RuntimeReady, Status: true},
		{Type: runtimeapi.NetworkReady, Status: true}}

	return &canned{
		status: fill(&runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: conditions}}),
		pods: fill(&runtimeapi.ListPodSandboxResponse{
			Items: []*runtimeapi.PodSandbox{{Id: "p", Metadata: clone(podMetadata)}},
		}),
		pod: fill(&runtimeapi.PodSandboxStatusResponse{
			Status:             pod(),
			ContainersStatuses: []*runtimeapi.ContainerStatus{container()},
		}),
		containers: fill(&runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{
			Id:           "c",
			PodSandboxId: "p",
			Metadata:     clone(containerMetadata),
			State:        runtimeapi.ContainerState_CONTAINER_RUNNING,
			Image:        clone(imageSpec),
			Labels:       labels,
		}}}),
		container:    fill(&runtimeapi.ContainerStatusResponse{Status: container()}),
		stats:        fill(&runtimeapi.ListContainerStatsResponse{Stats: []*runtimeapi.ContainerStats{stats()}}),
		podStatsList: fill(&runtimeapi.ListPodSandboxStatsResponse{Stats: []*runtimeapi.PodSandboxStats{podStats()}}),
		podStats:     fill(&runtimeapi.PodSandboxStatsResponse{Stats: podStats()}),
		descriptors: &runtimeapi.ListMetricDescriptorsResponse{
			Descriptors: []*runtimeapi.MetricDescriptor{{Name: "m", Help: "a metric"}},
		},
		metrics: &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: []*runtimeapi.PodSandboxMetrics{{
			PodSandboxId:     "p",
			ContainerMetrics: []*runtimeapi.ContainerMetrics{{ContainerId: "c", Metrics: []*runtimeapi.Metric{metric}}},
		}}},
		images: fill(&runtimeapi.ListImagesResponse{Images: []*runtimeapi.Image{{Id: "i", Spec: clone(imageSpec)}}}),
		image:  fill(&runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: "i", Spec: clone(imageSpec)}}),
		fs:     fill(&runtimeapi.ImageFsInfoResponse{}),
		event: fill(&runtimeapi.ContainerEventResponse{
			ContainerId:        "c",
			PodSandboxStatus:   pod(),
			ContainersStatuses: []*runtimeapi.ContainerStatus{container()},
		}),
	}
}

func clone[M proto.Message](m M) M { return proto.Clone(m).(M) }

// all returns the responses for the removal of messages, always in the same order.
func (c *canned) all() []proto.Message {
	return []proto.Message{
		c.status, c.pods, c.pod, c.containers, c.container, c.stats, c.podStatsList, c.podStats, c.descriptors,
		c.metrics, c.images, c.image, c.fs, c.event,
	}
}

func (*canned) Close(context.Context) error { return nil }

func (*canned) Version(context.Context, string) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           "0.1.0",
		RuntimeName:       "canned",
		RuntimeVersion:    "1.0.0",
		RuntimeApiVersion: "v1",
	}, nil
}

func (c *canned) Status(context.Context, bool) (*runtimeapi.StatusResponse, error) {
	return c.status, nil
}

func (c *canned) ListPodSandbox(context.Context, *runtimeapi.PodSandboxFilter) ([]*runtimeapi.PodSandbox, error) {
	return c.pods.Items, nil
}

func (c *canned) PodSandboxStatus(context.Context, string, bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	return c.pod, nil
}

func (c *canned) ListContainers(context.Context, *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error) {
	return c.containers.Containers, nil
}

func (c *canned) ContainerStatus(context.Context, string, bool) (*runtimeapi.ContainerStatusResponse, error) {
	return c.container, nil
}

func (c *canned) ListContainerStats(
	context.Context, *runtimeapi.ContainerStatsFilter,
) ([]*runtimeapi.ContainerStats, error) {
	return c.stats.Stats, nil
}

func (c *canned) ListPodSandboxStats(
	context.Context, *runtimeapi.PodSandboxStatsFilter,
) ([]*runtimeapi.PodSandboxStats, error) {
	return c.podStatsList.Stats, nil
}

func (c *canned) PodSandboxStats(context.Context, string) (*runtimeapi.PodSandboxStats, error) {
	return c.podStats.Stats, nil
}

func (c *canned) ListMetricDescriptors(context.Context) ([]*runtimeapi.MetricDescriptor, error) {
	return c.descriptors.Descriptors, nil
}

func (c *canned) ListPodSandboxMetrics(context.Context) ([]*runtimeapi.PodSandboxMetrics, error) {
	return c.metrics.PodMetrics, nil
}

func (c *canned) ListImages(context.Context, *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	return c.images.Images, nil
}

func (c *canned) ImageStatus(context.Context, *runtimeapi.ImageSpec, bool) (*runtimeapi.ImageStatusResponse, error) {
	return c.image, nil
}

func (c *canned) ImageFsInfo(context.Context) (*runtimeapi.ImageFsInfoResponse, error) {
	return c.fs, nil
}
