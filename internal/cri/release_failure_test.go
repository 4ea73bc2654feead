package cri

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestReleaseFailure fails every DEL. At first the kubelet gets the error. Later the pod is
// removed, and recovery releases its network once the plugin works again.
func TestReleaseFailure(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	broken := func(step string) error {
		if step == "network del" {
			return errBroken
		}
		return nil
	}

	w.fault = broken
	for range 3 {
		_, stop := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
		_, remove := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
		if !errors.Is(stop, errBroken) || !errors.Is(remove, errBroken) {
			t.Fatalf("the plugin's error is missing: %v, %v", stop, remove)
		}
	}

	w.later.Add(int64(time.Minute))
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatalf("after a minute: %v", err)
	}

	if _, err := s.View.Sandbox(id); !errdefs.IsNotFound(err) {
		t.Errorf("the pod still exists: %v", err)
	}

	select {
	case <-w.network.Leftovers():
	default:
		t.Error("no recovery was requested")
	}

	if err := s.Recover(t.Context()); !errors.Is(err, errBroken) {
		t.Errorf("recovery with a failing plugin: %v", err)
	}

	if got := keys(w, w.pins); !slices.Equal(got, []string{id}) {
		t.Errorf("pins of unreleased networks: %v", got)
	}

	w.fault = nil
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}

// TestRemoveSandboxWithNetworkOnly removes a pod without addresses after its pause container was
// removed by someone else.
func TestRemoveSandboxWithNetworkOnly(t *testing.T) {
	s, w := newService(t)
	for _, what := range []map[string]bool{w.attached, w.pins} {
		w.set(what, testID("cafe"), true)
		if _, err := s.RemovePodSandbox(t.Context(),
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: testID("cafe")}); err != nil {
			t.Error(err)
		}
		w.assertNoLeftovers(t, s)
	}
}

func TestVerboseStatusShowsNetwork(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	info := func() string {
		r, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		return r.Info["info"]
	}
	if got := info(); !strings.Contains(got, `"network":"ok"`) {
		t.Error(got)
	}

	w.fault = func(string) error { return errBroken }
	if got := info(); !strings.Contains(got, errBroken.Error()) {
		t.Error(got)
	}
}
