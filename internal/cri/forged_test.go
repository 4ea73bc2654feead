package cri

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestImageLabelsNeverReachAnswers runs the same pod from a clean image and from an image with
// reserved keys in its labels. All responses about the container must be equal.
func TestImageLabelsNeverReachAnswers(t *testing.T) {
	answers := func(labels map[string]string) (out []proto.Message) {
		s, w := newService(t)
		w.engine.ImageLabels = labels
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		created, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
		if err != nil {
			t.Fatal(err)
		}

		if _, err := s.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
			t.Fatal(err)
		}

		add := func(m proto.Message, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, m)
		}

		status, err := s.ContainerStatus(t.Context(),
			&runtimeapi.ContainerStatusRequest{ContainerId: created.ContainerId})
		add(status, err)
		list, err := received(s.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}))
		add(list, err)
		stats, err := s.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: created.ContainerId})
		if err == nil {
			stats.Stats = &runtimeapi.ContainerStats{Attributes: stats.GetStats().GetAttributes()}
		}

		add(stats, err)
		podStatus, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
		if err == nil {
			podStatus.Timestamp = 0
		}

		add(podStatus, err)

		return out
	}

	clean := answers(nil)
	forged := answers(map[string]string{
		"io.kubernetes.docker.type":       "podsandbox",
		"io.kubernetes.sandbox.id":        testID("f"),
		"io.kubernetes.container.logpath": "/etc/passwd",
		"io.kubernetes.container.name":    "POD",
		"io.kubernetes.pod.uid":           "victim",
		"annotation.forged":               "yes",
		"io.cri-dockerd.record":           "{}",
		"io.cri-dockerd.image-volumes":    `[{"image":"sha256:../../etc","target":"/x"}]`,
		"io.cri-dockerd.limits":           `{"unified":{"../x":"1"}}`,
		"io.cri-dockerd.pinned":           "true",
		"app":                             "forged",
	})

	for i := range clean {
		if diff := cmp.Diff(clean[i], forged[i], protocmp.Transform()); diff != "" {
			t.Errorf("%T (-clean +forged):\n%s", clean[i], diff)
		}
	}
}
