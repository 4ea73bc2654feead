package conformance

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/lifecycle"
)

// eventRecorder records the events of GetContainerEvents.
type eventRecorder struct {
	mu     sync.Mutex
	events []*runtimeapi.ContainerEventResponse
	ended  chan error
}

// recordEvents subscribes to events. From its return to the end of the test no event is missed.
func (n *node) recordEvents(t *testing.T) *eventRecorder {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := n.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = stream.Header()
	}

	if err != nil {
		cancel()
		t.Fatalf("GetContainerEvents: %v", err)
	}

	l := &eventRecorder{ended: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)

		for {
			e, err := stream.Recv()
			if err != nil {
				l.ended <- err
				return
			}

			l.mu.Lock()
			l.events = append(l.events, e)
			l.mu.Unlock()
		}
	}()

	t.Cleanup(func() { cancel(); <-done })

	return l
}

// of returns the events of a container or sandbox, and their types as words.
func (l *eventRecorder) of(id string) (events []*runtimeapi.ContainerEventResponse, words string) {
	l.mu.Lock()
	defer l.mu.Unlock()

	for _, e := range l.events {
		if e.ContainerId == id {
			events = append(events, e)
			word := strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_")
			words += " " + strings.ToLower(strings.TrimSuffix(word, "_EVENT"))
		}
	}

	return events, strings.TrimSpace(words)
}

// await waits until the object has exactly these events.
func (l *eventRecorder) await(t *testing.T, id, words string) []*runtimeapi.ContainerEventResponse {
	t.Helper()
	eventually(t, "events "+words, func() bool {
		_, got := l.of(id)
		return len(got) >= len(words)
	})

	events, got := l.of(id)
	if got != words {
		t.Fatalf("events %s, want %s", got, words)
	}

	return events
}

// TestContainerEvents checks the content of the events of containers and sandboxes.
func TestContainerEvents(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		l := n.recordEvents(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		l.await(t, pod, "created started")
		c := n.start(t, pod, cfg, sh("exit 3"))
		events := l.await(t, c, "created started stopped")
		for i, e := range events {
			if e.PodSandboxStatus.GetMetadata().GetUid() != cfg.Metadata.Uid ||
				e.PodSandboxStatus.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY ||
				len(e.ContainersStatuses) != 1 || i > 0 && e.CreatedAt <= events[i-1].CreatedAt {
				t.Errorf("event %d: %+v", i, e)
			}
		}

		if s := events[2].ContainersStatuses[0]; s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			s.ExitCode != 3 || s.Reason != "Error" || s.FinishedAt == 0 {
			t.Errorf("event stopped: %+v", s)
		}

		if got := events[0].PodSandboxStatus.GetNetwork().GetIp(); got == "" || got != n.podStatus(t, pod).Network.Ip {
			t.Errorf("pod address %q in the event", got)
		}

		n.removePod(t, pod)
		l.await(t, c, "created started stopped deleted")
		if e := l.await(t, pod, "created started stopped deleted")[3]; e.PodSandboxStatus.GetId() != pod ||
			len(e.ContainersStatuses) != 0 {
			t.Errorf("event deleted: %+v", e)
		}
	})
}

// TestEveryTransitionIsReported takes containers through their lifecycles, several at once. They
// exit, are stopped, or are removed.
func TestEveryTransitionIsReported(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		f, err := lifecycle.Run(t.Context(), lifecycle.Config{
			Runtime:    n.Runtime,
			Docker:     n.own(t).Docker(t),
			Pod:        n.runPod(t, cfg),
			PodOf:      cfg,
			Containers: 40,
			AtOnce:     4,
			Container: func(name string, command []string) *runtimeapi.ContainerConfig {
				cc := n.containerConfig(command)
				cc.Metadata.Name, cc.LogPath = name, name+".log"
				return cc
			},
		})
		if err != nil || len(f.Unexpected) > 0 {
			t.Fatalf("%v, wrong events: %v", err, f.Unexpected)
		}

		for kind, delays := range f.Latency {
			slices.Sort(delays)
			t.Logf("%s after the engine's event: median %s, at most %s",
				kind, delays[len(delays)/2], delays[len(delays)-1])
		}
	})
}

// TestMissedEvents ends a container while the engine is stopped. The exit is reported once, after
// the engine returns. The stream survives a restart of the engine and ends with the daemon.
func TestMissedEvents(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		l := n.recordEvents(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		ends := n.startNamed(t, pod, cfg, "ends", sh("sleep 1000"))
		stays := n.startNamed(t, pod, cfg, "stays", sh("sleep 1000"))
		pid := n.inspect(t, ends, ".State.Pid")
		n.own(t).Kill(t)
		n.run(t, "kill", "-9", pid)
		n.own(t).Restart(t)
		events := l.await(t, ends, "created started stopped")
		if s := events[2]; len(s.ContainersStatuses) != 2 {
			t.Errorf("event stopped: %+v", s)
		}

		n.docker(t, "rm", "-f", stays) // a later event, to prove that the exit is not repeated
		l.await(t, stays, "created started stopped deleted")
		l.await(t, ends, "created started stopped")
		begin := time.Now()
		n.Change(t)
		if err := <-l.ended; status.Code(err) != codes.Unavailable {
			t.Errorf("the event stream ends with %v, want Unavailable", err)
		}

		if d := time.Since(begin); d > scaled(9*time.Second) {
			t.Errorf("the daemon stopped after %s; it must not wait for event streams", d)
		}

		n.AwaitReady(t)
	})
}
