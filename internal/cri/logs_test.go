package cri

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func TestReopenContainerLog(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	reopen := func(id string) error {
		_, err := s.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
		return err
	}
	if err := reopen(c.ContainerId); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a created container: %v", err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err != nil {
		t.Fatal(err)
	}

	if err := reopen(c.ContainerId); err != nil || !w.logs[c.ContainerId+" reopened"] {
		t.Errorf("a running container: %v, %v", err, w.logs)
	}

	w.breakNth(1)
	if err := reopen(c.ContainerId); !errors.Is(err, errBroken) {
		t.Errorf("failed reopen: %v", err)
	}

	for _, id := range []string{pod, "nobody"} {
		if err := reopen(id); !errdefs.IsNotFound(err) {
			t.Errorf("unknown container %s: %v", id, err)
		}
	}

	w.engine.End(model.ContainerID(c.ContainerId), 0)
	eventually(t, func() bool { return errdefs.IsFailedPrecondition(reopen(c.ContainerId)) })
}

func TestStatusShowsLogMode(t *testing.T) {
	s, w := newService(t)
	tests := []struct {
		mode, reason string
		ready        bool
		condition    *runtimeapi.RuntimeCondition
	}{
		{"cri", "", true, &runtimeapi.RuntimeCondition{Status: true, Reason: "CRIFiles"}},
		{"json-file", "", true, &runtimeapi.RuntimeCondition{Status: true, Reason: "JSONFile"}},
		{"json-file", "no socket", true, &runtimeapi.RuntimeCondition{
			Status:  false,
			Reason:  "JSONFile",
			Message: "no socket",
		}},
		{"", "no socket", false, &runtimeapi.RuntimeCondition{
			Status:  false,
			Reason:  logsNotReady,
			Message: "no socket",
		}},
	}

	for _, test := range tests {
		t.Run(test.mode+" "+test.reason, func(t *testing.T) {
			w.mu.Lock()
			w.logMode, w.logReason = test.mode, test.reason
			w.mu.Unlock()
			st, err := s.Status(t.Context(), &runtimeapi.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}

			runtime, logs := st.Status.Conditions[0], st.Status.Conditions[2]
			if runtime.Status != test.ready || !test.ready && runtime.Message != test.reason {
				t.Errorf("mode %q: RuntimeReady is %v", test.mode, runtime)
			}

			if logs.Type != containerLogs || logs.Status != test.condition.Status ||
				logs.Reason != test.condition.Reason || logs.Message != test.condition.Message {
				t.Errorf("mode %q: ContainerLogs is %v", test.mode, logs)
			}
		})
	}
}
