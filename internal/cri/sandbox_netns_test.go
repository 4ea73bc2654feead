package cri

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// netnsOf returns the condition for the creator of pod network namespaces.
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

// TestPausesThatCannotJoin: the engine does not let pause processes into the daemon's namespaces.
// The first pod detects this and gets a namespace of the engine, as do all later pods.
func TestPausesThatCannotJoin(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	w.stray.Store(true)
	for range 2 {
		sb, err := s.View.Sandbox(runPod(t, s, w.pod()))
		if err != nil || sb.OwnNetNS || sb.HostNetwork() || sb.NetworkMode != "none" {
			t.Errorf("sandbox: %+v, %v", sb, err)
		}

		c := netnsOf(t, s)
		if c.Status || c.Reason != "CreatedByEngine" || !strings.Contains(c.Message, "did not join") {
			t.Errorf("condition: %v", c)
		}
	}
}

// TestPauseThatDoesNotJoin: one failure on a node with successful joins fails its pod.
func TestPauseThatDoesNotJoin(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	id := runPod(t, s, w.pod())
	if sb, err := s.View.Sandbox(id); err != nil || !sb.OwnNetNS || sb.HostNetwork() {
		t.Errorf("sandbox: %+v, %v", sb, err)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}

	w.stray.Store(true)
	_, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "did not join the pod's network namespace") {
		t.Errorf("RunPodSandbox: %v", err)
	}

	w.assertNoLeftovers(t, s)
	if c := netnsOf(t, s); !c.Status || c.Reason != "CreatedByDaemon" {
		t.Errorf("condition: %v", c)
	}
}

// TestUnrelatedEngineFailure: not every failure of the first pod counts as a failed join.
func TestUnrelatedEngineFailure(t *testing.T) {
	s, w := newService(t)
	w.fault = func(step string) error {
		if step == "start" {
			return errBroken
		}
		return nil
	}
	if _, err := s.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errors.Is(err, errBroken) {
		t.Errorf("RunPodSandbox: error %v, want %v", err, errBroken)
	}

	w.fault = nil
	w.assertNoLeftovers(t, s)
	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || !sb.OwnNetNS {
		t.Errorf("sandbox: %+v, %v", sb, err)
	}
}

// TestSandboxImageRemovedAMomentAgo removes the sandbox image while the view still has it.
func TestSandboxImageRemovedAMomentAgo(t *testing.T) {
	s, w := newService(t)
	errNoImage := fmt.Errorf("No such image: %w", errdefs.ErrNotFound)
	w.setFault(func(step string) (err error) {
		if step == "create" {
			err, errNoImage = errNoImage, nil
		}
		return err
	})

	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || !sb.OwnNetNS || errNoImage != nil {
		t.Errorf("sandbox: %+v, %v", sb, err)
	}
}

func TestPauseExitError(t *testing.T) {
	for code, want := range map[int]string{
		1:   "setns: operation not permitted",
		22:  "setns: invalid argument",
		113: "open its network namespace: permission denied",
		200: "privileges",
		0:   "exit code 0",
	} {
		if err := pauseExitError(&model.Sandbox{OwnNetNS: true, ExitCode: code}); !strings.Contains(err.Error(), want) {
			t.Errorf("exit code %d: %v, want %q", code, err, want)
		}
	}

	if err := pauseExitError(&model.Sandbox{ExitCode: 1}); strings.Contains(err.Error(), "namespace") {
		t.Error(err)
	}
}
