package cri

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestFallBackIsTemporary: after one failure the engine creates the namespaces only for a while.
func TestFallBackIsTemporary(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	own := func() bool {
		t.Helper()
		sb, err := s.View.Sandbox(runPod(t, s, w.pod()))
		if err != nil {
			t.Fatal(err)
		}
		return sb.OwnNetNS
	}

	w.stray.Store(true)
	if own() {
		t.Error("the daemon created the namespace of the first pod")
	}

	w.stray.Store(false)
	if own() || netnsOf(t, s).Status {
		t.Error("the engine does not create the namespaces")
	}

	past := func() {
		s.joining.mu.Lock()
		defer s.joining.mu.Unlock()
		s.joining.until = time.Now()
	}

	past()
	w.stray.Store(true)
	if own() || s.joining.pause != 2*fallBackMin {
		t.Errorf("after the second failure: interval %v", s.joining.pause)
	}

	w.stray.Store(false)
	past()
	if first, second := own(), own(); !first || !second || !netnsOf(t, s).Status {
		t.Error("a successful join does not end the fallback")
	}
}

// TestFallBackEndsWithTheConnection: after the engine was reconnected, the next pod tries again.
func TestFallBackEndsWithTheConnection(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	w.stray.Store(true)
	runPod(t, s, w.pod())
	w.stray.Store(false)
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || !sb.OwnNetNS || !netnsOf(t, s).Status {
		t.Errorf("sandbox: %+v, %v", sb, err)
	}
}

// TestTrustEnds: on a node with earlier joins, a few failures only fail their pods. After more
// failures, the engine creates the namespaces.
func TestTrustEnds(t *testing.T) {
	s, w := newService(t)
	s.joining.timeout = 10 * time.Millisecond
	runPod(t, s, w.pod())
	w.stray.Store(true)
	for i := 1; i < maxJoinFailures; i++ {
		if _, err := s.RunPodSandbox(t.Context(),
			&runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errdefs.IsUnavailable(err) {
			t.Errorf("failure %d: %v", i, err)
		}
	}

	if sb, err := s.View.Sandbox(runPod(t, s, w.pod())); err != nil || sb.OwnNetNS {
		t.Errorf("sandbox: %+v, %v", sb, err)
	}
}

// TestOnePodTries: after the interval one pod tries, and the others do not wait for it.
func TestOnePodTries(t *testing.T) {
	j := joining{}
	now := time.Now()
	until := j.fallBack("x", now)
	if j.try(now) || j.try(until.Add(-time.Second)) || !j.try(until) || j.try(until) ||
		!j.try(until.Add(fallBackMin)) {
		t.Error("not exactly one pod tries")
	}

	for range 20 {
		until = j.fallBack("x", now)
	}

	if until.Sub(now) != fallBackMax {
		t.Errorf("interval %v", until.Sub(now))
	}

	flag := joining{configured: "--pod-netns=engine"}
	flag.retry()
	if flag.try(now.Add(time.Hour)) || flag.reason() != "--pod-netns=engine" {
		t.Error("the flag was ignored")
	}
}
