package cri

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func TestLimitedBuffer(t *testing.T) {
	var budget outputBytes
	c := limitedBuffer{budget: &budget}
	var want bytes.Buffer
	for i := range 60 {
		piece := bytes.Repeat([]byte{byte(i)}, 500_000+i)
		want.Write(piece)
		if n, err := c.Write(piece); n != len(piece) || err != nil {
			t.Fatalf("write: %d bytes, %v", n, err)
		}
	}

	if got := c.bytes(); !bytes.Equal(got, want.Bytes()[:outputLimit]) || c.err() != nil {
		t.Errorf("%d bytes or wrong content; %v", len(got), c.err())
	}

	if c.release(); budget.held.Load() != 0 {
		t.Errorf("%d bytes are not released", budget.held.Load())
	}
}

// TestOutputOfAllCallsIsBounded: calls with endless output share the budget and leave room for
// others.
func TestOutputOfAllCallsIsBounded(t *testing.T) {
	var budget outputBytes
	endless := make([]limitedBuffer, 20)
	for i := range endless {
		endless[i].budget = &budget
	}

	for range 2000 { // concurrent, 16 MiB each
		for i := range endless {
			_, _ = endless[i].Write(make([]byte, 8<<10))
		}
	}

	if held := budget.held.Load(); held > outputBudget {
		t.Errorf("%d bytes are reserved", held)
	}

	for i := range endless {
		if err := endless[i].err(); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "48 MiB") {
			t.Errorf("call %d: %v", i, err)
		}
	}

	probe := limitedBuffer{budget: &budget}
	_, _ = probe.Write(bytes.Repeat([]byte("x"), 200<<10))
	if err := probe.err(); err != nil || len(probe.bytes()) != 200<<10 {
		t.Errorf("a concurrent probe: %d bytes, %v", len(probe.bytes()), err)
	}

	for i := range endless {
		endless[i].release()
	}

	if probe.release(); budget.held.Load() != 0 {
		t.Errorf("%d bytes are not released", budget.held.Load())
	}
}

// TestExecSyncEndsWithContainer: ExecSync returns even if the engine does not end the session.
func TestExecSyncEndsWithContainer(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err != nil {
		t.Fatal(err)
	}

	ended := make(chan error, 1)
	go func() {
		_, err := s.ExecSync(t.Context(),
			&runtimeapi.ExecSyncRequest{ContainerId: c.ContainerId, Cmd: []string{"hang"}})
		ended <- err
	}()

	select {
	case err := <-ended:
		t.Fatalf("the command has ended: %v", err)
	case <-time.After(2 * sessionCheckInterval):
	}

	if err := w.engine.Stop(t.Context(), model.ContainerID(c.ContainerId), 0); err != nil {
		t.Fatal(err)
	}

	select {
	case err := <-ended:
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "has ended") {
			t.Errorf("ExecSync: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("ExecSync did not return")
	}
}
