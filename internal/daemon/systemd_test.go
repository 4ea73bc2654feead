package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/logs"
	"cri-dockerd/internal/process"
	"cri-dockerd/internal/view"
)

// awaitNotification returns all notifications up to the first one with a prefix.
func awaitNotification(t *testing.T, c *net.UnixConn, prefix string) []string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}

	var all []string
	for buf := make([]byte, 4096); ; {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("wait for notification %s: %v; got %q", prefix, err, all)
		}

		all = append(all, string(buf[:n]))
		if strings.HasPrefix(string(buf[:n]), prefix) {
			return all
		}
	}
}

// TestStatusWithoutEngine checks that a stopped engine does not delay the start, and that the
// status line reports it before the unit is ready.
func TestStatusWithoutEngine(t *testing.T) {
	notified := notifySocket(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, configure(t, t.TempDir()), "test", slog.New(slog.DiscardHandler)) }()
	all := awaitNotification(t, notified, process.Ready)
	if last := all[len(all)-2]; !strings.HasPrefix(last, "STATUS=Not ready: Docker does not answer") ||
		!strings.Contains(last, "systemctl start docker") || strings.Contains(last, "\n") {
		t.Errorf("before READY=1: got %q", all)
	}

	stop()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestHangingEngine checks that an engine without responses delays the start until the timeout, and
// that the status line reports the engine.
func TestHangingEngine(t *testing.T) {
	dir, notified := t.TempDir(), notifySocket(t)
	l, err := net.Listen("unix", filepath.Join(dir, "hung.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	p, err := wire(configure(t, dir, "--docker-endpoint=unix://"+filepath.Join(dir, "hung.sock")), "test",
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- ignoreCanceled(p.view.Run(ctx)) }()
	started := make(chan struct{})
	go func() { ended <- p.notifySystemd(ctx, started) }()
	const timeout = 300 * time.Millisecond
	start := time.Now()
	p.awaitEngine(ctx, timeout, isKnown)
	if took := time.Since(start); took < timeout {
		t.Errorf("awaitEngine returned after %v, want %v", took, timeout)
	}

	close(started)
	if all := awaitNotification(t, notified, process.Ready); !strings.HasPrefix(all[0],
		"STATUS=Not ready: not yet connected to Docker") {
		t.Errorf("before READY=1: got %q", all)
	}

	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// TestAwaitLogs checks that the start waits for the log mode, unless the engine is down or the
// timeout expires.
func TestAwaitLogs(t *testing.T) {
	engine := enginetest.NewFake()
	engine.SetDown(true)
	log := slog.New(slog.DiscardHandler)
	p := &parts{view: view.New(engine, log), logs: logs.New(logs.Config{Mode: logs.ModeAuto, Log: log})}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- ignoreCanceled(p.view.Run(ctx)) }()
	p.awaitEngine(ctx, time.Hour, isKnown)
	p.awaitLogs(ctx, time.Hour) // the engine is down
	engine.SetDown(false)
	<-p.view.Synced()
	const timeout = 300 * time.Millisecond
	start := time.Now()
	if p.awaitLogs(ctx, timeout); time.Since(start) < timeout {
		t.Error("awaitLogs did not wait")
	}

	p.logs = logs.New(logs.Config{Mode: logs.ModeJSONFile, Log: log})
	p.awaitLogs(ctx, time.Hour)
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestStatusLine(t *testing.T) {
	condition := func(name string, ok bool, message string) *runtimeapi.RuntimeCondition {
		return &runtimeapi.RuntimeCondition{Type: name, Status: ok, Message: message}
	}

	for want, c := range map[string][]*runtimeapi.RuntimeCondition{
		"Ready, Docker 29.0": {
			condition(runtimeapi.RuntimeReady, true, ""), condition(runtimeapi.NetworkReady, true, "a notice"),
			condition("ContainerLogs", false, "json-file"),
		},
		"Not ready: no engine; no CNI configuration, install a network add-on": {
			condition(runtimeapi.RuntimeReady, false, "no engine"), condition(runtimeapi.NetworkReady, false,
				"no CNI configuration,\n  install a network add-on"),
		},
	} {
		t.Run(want, func(t *testing.T) {
			if got := statusLine(&runtimeapi.RuntimeStatus{Conditions: c}, "29.0"); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// TestHold checks that calls wait for the first read of the engine, except for Version and
// RuntimeConfig, and end with the context of the caller.
func TestHold(t *testing.T) {
	p := &parts{known: make(chan struct{})}
	for _, method := range []string{"Version", "RuntimeConfig"} {
		if err := p.hold(t.Context(), method); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()

	if err := p.hold(ctx, "ListPodSandbox"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("before the first read: got error %v", err)
	}

	close(p.known)
	if err := p.hold(t.Context(), "ListPodSandbox"); err != nil {
		t.Errorf("after the first read: %v", err)
	}
}
