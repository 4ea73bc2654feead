package conformance

import (
	"errors"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// drain reads a stream to its end.
func drain[T any](t *testing.T, open func() (grpc.ServerStreamingClient[T], error)) (all []*T) {
	t.Helper()
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}

	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

// TestStreamedLists compares the streams with the lists (KEP-5825, kubelet 1.36 with
// CRIListStreaming).
func TestStreamedLists(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t) // many runtimes lack these RPCs
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		var pods, containers, images []string
		for _, m := range drain(t, func() (grpc.ServerStreamingClient[runtimeapi.StreamPodSandboxesResponse], error) {
			return n.Runtime.StreamPodSandboxes(t.Context(),
				&runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: pod}})
		}) {
			for _, p := range m.PodSandboxes {
				pods = append(pods, p.Id)
			}
		}

		for _, m := range drain(t, func() (grpc.ServerStreamingClient[runtimeapi.StreamContainersResponse], error) {
			return n.Runtime.StreamContainers(t.Context(),
				&runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod}})
		}) {
			for _, p := range m.Containers {
				containers = append(containers, p.Id)
			}
		}

		for _, m := range drain(t, func() (grpc.ServerStreamingClient[runtimeapi.StreamImagesResponse], error) {
			return n.Image.StreamImages(t.Context(),
				&runtimeapi.StreamImagesRequest{
					Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: n.image}},
				})
		}) {
			for _, i := range m.Images {
				images = append(images, i.RepoTags...)
			}
		}

		if !slices.Equal(pods, []string{pod}) || !slices.Equal(containers, []string{c}) ||
			!slices.Equal(images, []string{n.image}) {
			t.Errorf("streamed pods %v, containers %v, images %v", pods, containers, images)
		}
	})
}

// TestStatusOfAPodHasItsContainers checks the fields used by the evented PLEG.
func TestStatusOfAPodHasItsContainers(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		r, err := n.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
		if err != nil || r.Timestamp <= r.Status.CreatedAt || len(r.ContainersStatuses) != 1 ||
			r.ContainersStatuses[0].Id != c ||
			r.ContainersStatuses[0].State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("PodSandboxStatus: %v, %v", r, err)
		}
	})
}
