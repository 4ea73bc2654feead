package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testImage = "app:1"

// TestRunPodSandboxFailsAtEachStep breaks each step of RunPodSandbox, before and after its effect.
// Nothing may remain, and a retry must succeed.
func TestRunPodSandboxFailsAtEachStep(t *testing.T) {
	tests := map[string][]string{
		"": {"create", "create, after", "keep", "keep, after", "netns", "network add", "network add, after",
			"network confirm", "pause image", "pause image, after", "start", "start, after"},
		"by a flag": {"create", "create, after", "network add", "network add, after", "network confirm", "pause image",
			"pause image, after", "pin", "pin, after", "start", "start, after"},
	}

	for reason, want := range tests {
		t.Run(fmt.Sprintf("reason %q", reason), func(t *testing.T) {
			s, w := newServiceWith(t, reason)
			remove := func(id string) {
				t.Helper()
				if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
					PodSandboxId: id,
				}); err != nil {
					t.Errorf("RemovePodSandbox: %v", err)
				}
				w.assertNoLeftovers(t, s)
			}

			var first string
			steps := w.stepsOf(func() { first = runPod(t, s, w.pod()) })
			remove(first)
			slices.Sort(steps)
			if !slices.Equal(steps, want) {
				t.Errorf("steps %q, want %q: a step was added or removed", steps, want)
			}

			for _, step := range steps {
				cfg := w.pod()
				w.breakOnce(step)
				r, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
				w.setFault(nil)
				if err == nil || r != nil {
					t.Errorf("%s failed and RunPodSandbox returned %v, %v", step, r, err)
				}

				if !errors.Is(err, errBroken) {
					t.Errorf("%s: the error lacks the cause: %v", step, err)
				}

				w.assertNoLeftovers(t, s)
				remove(runPod(t, s, cfg))
			}
		})
	}
}

func TestCreateAndStartFailAtEachStep(t *testing.T) {
	s, w := newService(t)
	for n := 1; ; n++ {
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		name := w.breakNth(n)
		c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
		if err == nil {
			_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
		}

		step := name()
		if step == "" {
			if n < 5 {
				t.Errorf("only %d steps were broken", n-1)
			}
			break
		}

		if !errors.Is(err, errBroken) {
			t.Errorf("%s failed with error %v, want %v", step, err, errBroken)
		}

		if c == nil { // the kubelet retries at once
			if _, err := s.CreateContainer(t.Context(), createRequest(pod, cfg)); err != nil {
				t.Errorf("%s: the retry: %v", step, err)
			}
		}

		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: pod,
		}); err != nil {
			t.Errorf("%s: RemovePodSandbox: %v", step, err)
		}

		w.assertNoLeftovers(t, s)
		if n > 50 {
			t.Fatal("endless steps")
		}
	}
}

func TestCancelledRunLeavesNothing(t *testing.T) {
	s, w := newService(t)
	for _, at := range []string{"create, after", "start", "start, after", "network add"} {
		ctx, cancel := context.WithCancel(t.Context())
		w.fault = func(step string) error {
			if step == at {
				cancel()
				return ctx.Err()
			}
			return nil
		}
		if _, err := s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errors.Is(err,
			context.Canceled) {
			t.Errorf("cancelled at %s: %v", at, err)
		}

		cancel()
		w.fault = nil
		w.assertNoLeftovers(t, s)
	}
}

func TestFailedUndoKeepsTheSandboxListed(t *testing.T) {
	s, w := newService(t)
	w.fault = func(step string) error {
		if step == "network add, after" || step == "network del" {
			return errBroken
		}
		return nil
	}
	if _, err := s.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errors.Is(err, errBroken) {
		t.Fatalf("RunPodSandbox: error %v, want %v", err, errBroken)
	}

	l, err := received(s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}))
	if err != nil || len(l.Items) != 1 || l.Items[0].State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Fatalf("list: %v, %v", l, err)
	}

	w.fault = nil
	if _, err := s.RemovePodSandbox(t.Context(),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: l.Items[0].Id}); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}

func TestRunPodSandboxTwice(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	first := runPod(t, s, cfg)
	if second := runPod(t, s, cfg); second != first {
		t.Errorf("the second call created another sandbox")
	}

	w.engine.End(model.ContainerID(first), 0) // the pause process was killed: the retry replaces the leftover
	if third := runPod(t, s, cfg); third == first {
		t.Error("got a dead sandbox")
	}
}

func TestStartTwice(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	start := func() error {
		_, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
		return err
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}

	if err := start(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start of a running container: %v", err)
	}
}

// TestNameInUseByARunningContainer: the undo never touches objects not created by the call.
func TestNameInUseByARunningContainer(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err != nil {
		t.Fatal(err)
	}

	if _, err := s.CreateContainer(t.Context(), createRequest(pod, cfg)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create under a name in use: %v", err)
	}

	st, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
	if err != nil || st.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the running container: %v, %v", st, err)
	}
}

func TestEngineDown(t *testing.T) {
	s, w := newService(t)
	w.engine.SetDown(true)
	eventually(t, func() bool { return !s.View.Engine().Ready })
	if _, err := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("list while the engine is down: %v", err)
	}

	st, err := s.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil || st.Status.Conditions[0].Status || st.Status.Conditions[0].Message == "" {
		t.Errorf("Status: %v, %v", st, err)
	}

	w.engine.SetDown(false)
	eventually(t, func() bool { return s.View.Engine().Ready })
	if _, err := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s")
		}
	}
}

func TestRecover(t *testing.T) {
	s, w := newService(t)
	healthy, lost, dead := runPod(t, s, w.pod()), runPod(t, s, w.pod()), runPod(t, s, w.pod())
	w.engine.Drop(model.ContainerID(lost))
	w.engine.End(model.ContainerID(dead), 0)
	halfMade, failed := createPause(t, w), createPause(t, w)
	w.engine.End(failed, 128) // as after a failed start
	eventually(t, func() bool {
		_, err := s.View.Sandbox(lost)
		sb, halfErr := s.View.Sandbox(string(halfMade))
		f, failedErr := s.View.Sandbox(string(failed))
		d, deadErr := s.View.Sandbox(dead)
		return err != nil && halfErr == nil && !sb.Running && failedErr == nil && !f.NeverStarted && deadErr == nil &&
			!d.Running
	})

	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	if got := keys(w, w.attached); !slices.Equal(got, []string{healthy}) {
		t.Errorf("attached after recovery: %v, want only %s", got, healthy)
	}
	if got := keys(w, w.pins); !slices.Equal(got, []string{healthy}) {
		t.Errorf("pins after recovery: %v", got)
	}

	for _, id := range []model.ContainerID{halfMade, failed} {
		if _, err := s.View.Sandbox(string(id)); !errdefs.IsNotFound(err) {
			t.Errorf("incomplete sandbox %s: %v", id, err)
		}
	}

	if _, err := s.View.Sandbox(dead); err != nil {
		t.Errorf("the kubelet must remove a dead pod itself: %v", err)
	}
}

// createPause creates a sandbox directly at the engine and does not start it.
func createPause(t *testing.T, w *world) model.ContainerID {
	t.Helper()
	o := translate.SandboxOptions{
		Image:       model.PauseImage{Source: enginetest.PauseRef, Name: enginetest.PauseRef},
		NetworkMode: "none",
	}

	create, err := translate.NewSandbox(w.pod(), o)
	if err != nil {
		t.Fatal(err)
	}

	id, err := w.engine.Create(t.Context(), create)
	if err != nil {
		t.Fatal(err)
	}

	return id
}

func TestExecSync(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	exec := func(timeout int64, cmd ...string) (*runtimeapi.ExecSyncResponse, error) {
		return s.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: c.ContainerId,
			Cmd:         cmd,
			Timeout:     timeout,
		})
	}
	if _, err := exec(0, "true"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in a created container: %v", err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err != nil {
		t.Fatal(err)
	}

	if r, err := exec(0, "say", "it"); err != nil || string(r.Stdout) != "say it\n" || r.ExitCode != 0 {
		t.Errorf("exec: %v, %v", r, err)
	}

	if r, err := exec(0, "fail"); err != nil || r.ExitCode != 1 {
		t.Errorf("exec of a failing command: %v, %v", r, err)
	}

	if _, err := exec(1, "hang"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec of a hanging command: %v", err)
	}
}

// testID returns a container ID with these first digits.
func testID(digits string) string { return digits + strings.Repeat("0", 64-len(digits)) }
