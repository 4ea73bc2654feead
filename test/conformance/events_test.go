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

	"cri-dockerd/test/lives"
)

// listener takes down what GetContainerEvents tells.
type listener struct {
	mu     sync.Mutex
	events []*runtimeapi.ContainerEventResponse
	ended  chan error
}

// listen begins to listen; nothing is missed from when it returns to the end of the test.
func (n *node) listen(t *testing.T) *listener {
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

	l := &listener{ended: make(chan error, 1)}
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

// of is what has been told of a container or sandbox.
func (l *listener) of(id string) (events []*runtimeapi.ContainerEventResponse, words string) {
	l.mu.Lock()
	defer l.mu.Unlock()

	for _, e := range l.events {
		if e.ContainerId == id {
			events = append(events, e)
			words += " " +
				strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"),
					"_EVENT"))
		}
	}

	return events, strings.TrimSpace(words)
}

// await waits until exactly this has been told.
func (l *listener) await(t *testing.T, id, words string) []*runtimeapi.ContainerEventResponse {
	t.Helper()
	eventually(t, "told: "+words, func() bool {
		_, got := l.of(id)
		return len(got) >= len(words)
	})

	events, got := l.of(id)
	if got != words {
		t.Fatalf("told %s, want %s", got, words)
	}

	return events
}

// TestContainerEvents: what a kubelet needs stands in the events, of containers and sandboxes.
func TestContainerEvents(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		l := n.listen(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		l.await(t, pod, "created started")
		c := n.start(t, pod, cfg, sh("exit 3"))
		events := l.await(t, c, "created started stopped")
		for i, e := range events {
			if e.PodSandboxStatus.GetMetadata().GetUid() != cfg.Metadata.Uid ||
				e.PodSandboxStatus.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY ||
				len(e.ContainersStatuses) != 1 || i > 0 && e.CreatedAt <= events[i-1].CreatedAt {
				t.Errorf("%+v", e)
			}
		}

		if s := events[2].ContainersStatuses[0]; s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			s.ExitCode != 3 || s.Reason != "Error" || s.FinishedAt == 0 {
			t.Errorf("stopped: %+v", s)
		}

		if got := events[0].PodSandboxStatus.GetNetwork().GetIp(); got == "" || got != n.podStatus(t, pod).Network.Ip {
			t.Errorf("the pod's address in the event is %q", got)
		}

		n.removePod(t, pod)
		l.await(t, c, "created started stopped deleted")
		if e := l.await(t, pod, "created started stopped deleted")[3]; e.PodSandboxStatus.GetId() != pod ||
			len(e.ContainersStatuses) != 0 {
			t.Errorf("deleted: %+v", e)
		}
	})
}

// TestEveryTransitionIsTold takes containers through their lives, which end by themselves, by a
// stop and by a removal, several at once.
func TestEveryTransitionIsTold(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		f, err := lives.Run(t.Context(), lives.Config{
			Runtime: n.Runtime,
			Docker:  n.own(t).Docker(t),
			Pod:     n.runPod(t, cfg),
			PodOf:   cfg,
			Lives:   40,
			AtOnce:  4,
			Container: func(name string, command []string) *runtimeapi.ContainerConfig {
				cc := n.containerConfig(command)
				cc.Metadata.Name, cc.LogPath = name, name+".log"
				return cc
			},
		})
		if err != nil || len(f.Wrong) > 0 {
			t.Fatalf("%v, told wrongly: %v", err, f.Wrong)
		}

		for kind, behind := range f.Behind {
			slices.Sort(behind)
			t.Logf("%s after the engine's event: %s in the middle, %s at most", kind, behind[len(behind)/2],
				behind[len(behind)-1])
		}
	})
}

// TestEventsOfWhatWasMissed: what happens while the engine is away is told when it is back, once;
// the stream outlives the engine, and ends with the daemon.
func TestEventsOfWhatWasMissed(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		l := n.listen(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		ends, stays := n.startNamed(t, pod, cfg, "ends", sh("sleep 1000")), n.startNamed(t, pod, cfg, "stays",
			sh("sleep 1000"))
		pid := n.inspect(t, ends, ".State.Pid")
		n.own(t).Kill(t)
		n.run(t, "kill", "-9", pid)
		n.own(t).Restart(t)
		events := l.await(t, ends, "created started stopped")
		if s := events[2]; len(s.ContainersStatuses) != 2 {
			t.Errorf("stopped: %+v", s)
		}

		n.docker(t, "rm", "-f", stays) // the first event that can be told after
		l.await(t, stays, "created started stopped deleted")
		l.await(t, ends, "created started stopped")
		begin := time.Now()
		n.Change(t)
		if err := <-l.ended; status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ends with %v", err)
		}

		if d := time.Since(begin); d > 9*time.Second {
			t.Errorf("the daemon's stop took %s: it waited for the stream", d)
		}

		n.AwaitReady(t)
	})
}
