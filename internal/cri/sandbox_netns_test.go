package cri

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// netnsOf is the condition that says who makes pods' network namespaces.
func netnsOf(t *testing.T, s *Service) *runtimeapi.RuntimeCondition {
	t.Helper()
	r, err := s.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range r.Status.Conditions {
		if c.Type == podNetNS {
			return c
		}
	}

	t.Fatalf("no condition %s", podNetNS)

	return nil
}

// TestPausesThatCannotJoin is a node where the engine does not let a pause into a namespace of
// ours: the first pod shows it, gets one of the engine's, and so do all others.
func TestPausesThatCannotJoin(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	w.stray.Store(true)
	for range 2 {
		sb, err := s.View.Sandbox(runPod(t, s, w.pod()))
		if err != nil || sb.OwnNetNS || sb.HostNetwork() || sb.NetworkMode != "none" {
			t.Errorf("%+v, %v", sb, err)
		}
		if c := netnsOf(t, s); c.Status || c.Reason != "Engine" || !strings.Contains(c.Message, "did not join") {
			t.Errorf("condition: %v", c)
		}
	}
}

// TestPauseThatDoesNotJoin is one among others that do: its pod fails.
func TestPauseThatDoesNotJoin(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	id := runPod(t, s, w.pod())
	if sb, err := s.View.Sandbox(id); err != nil || !sb.OwnNetNS || sb.HostNetwork() {
		t.Errorf("%+v, %v", sb, err)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}

	w.stray.Store(true)
	_, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "did not join the pod's network namespace") {
		t.Errorf("%v", err)
	}

	w.nothingLeft(t, s)
	if c := netnsOf(t, s); !c.Status || c.Reason != "Own" {
		t.Errorf("condition: %v", c)
	}
}

// TestEngineFailsForItsOwnReasons makes sure that not every failure of the first pod is taken for
// one of joining.
func TestEngineFailsForItsOwnReasons(t *testing.T) {
	s, w := newService(t)
	w.fault = func(step string) error {
		if step == "start" {
			return errBroken
		}
		return nil
	}
	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()}); err == nil {
		t.Error("it succeeded")
	}

	w.fault = nil
	w.nothingLeft(t, s)
	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || !sb.OwnNetNS {
		t.Errorf("%+v, %v", sb, err)
	}
}

// TestSandboxImageRemovedAMomentAgo is one that the view still knows when the sandbox is made from
// it.
func TestSandboxImageRemovedAMomentAgo(t *testing.T) {
	s, w := newService(t)
	gone := fmt.Errorf("No such image: %w", errdefs.ErrNotFound)
	w.setFault(func(step string) (err error) {
		if step == "create" {
			err, gone = gone, nil
		}
		return err
	})

	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || !sb.OwnNetNS || gone != nil {
		t.Errorf("%+v, %v", sb, err)
	}
}

func TestEndedPauseSaysWhy(t *testing.T) {
	for code, want := range map[int]string{
		1:   "setns: operation not permitted",
		22:  "setns: invalid argument",
		113: "open its network namespace: permission denied",
		200: "privileges",
		0:   "exit code 0",
	} {
		if err := ended(&spec.Sandbox{OwnNetNS: true, ExitCode: code}); !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %v, want %q", code, err, want)
		}
	}

	if err := ended(&spec.Sandbox{ExitCode: 1}); strings.Contains(err.Error(), "namespace") {
		t.Error(err)
	}
}
