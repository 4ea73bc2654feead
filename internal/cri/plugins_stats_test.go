package cri

import (
	"bytes"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// statsOf returns the RPCs of stats that show an object.
func statsOf(t *testing.T, s *Service, id string) (shown []string) {
	t.Helper()
	add := func(rpc string, isShown bool) {
		if isShown {
			shown = append(shown, rpc)
		}
	}

	_, err := s.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	add("PodSandboxStats", err == nil)
	_, err = s.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	add("ContainerStats", err == nil)

	contains := func(m proto.Message, err error) bool { // attributes may be encoded already
		b, encodeErr := proto.Marshal(m)
		return err != nil || encodeErr != nil || bytes.Contains(b, []byte(id))
	}
	pods, err := s.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	add("ListPodSandboxStats", contains(pods, err))
	containers, err := s.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
	add("ListContainerStats", contains(containers, err))
	add("ListPodSandboxMetrics", bytes.Contains(s.Stats.Metrics(), []byte(id)))

	return shown
}

// TestStatsOfConcealed expects no stats of objects whose plugins have not completed, and stats
// afterwards.
func TestStatsOfConcealed(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	var events []string
	p.fails = func(event string) error {
		var id string
		switch event {
		case "RunPodSandbox":
			id = string(s.View.Sandboxes()[0].ID)
		case "CreateContainer":
			id = string(s.View.Containers()[0].ID)
		default:
			return nil
		}

		events = append(events, event)
		if shown := statsOf(t, s, id); len(shown) > 0 {
			t.Errorf("%s: %q show the object", event, shown)
		}
		return nil
	}

	if err := s.startPlugged(t.Context(), w.pod()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"RunPodSandbox", "CreateContainer"}; !slices.Equal(events, want) {
		t.Errorf("events %q, want %q", events, want)
	}

	want := []string{"PodSandboxStats", "ListPodSandboxStats", "ListPodSandboxMetrics"}
	if shown := statsOf(t, s, string(s.View.Sandboxes()[0].ID)); !slices.Equal(shown, want) {
		t.Errorf("%q show the complete pod, want %q", shown, want)
	}
	want = []string{"ContainerStats", "ListPodSandboxStats", "ListContainerStats", "ListPodSandboxMetrics"}
	if shown := statsOf(t, s, string(s.View.Containers()[0].ID)); !slices.Equal(shown, want) {
		t.Errorf("%q show the complete container, want %q", shown, want)
	}
}
