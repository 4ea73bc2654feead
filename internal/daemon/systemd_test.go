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

// heard is what systemd is told until a message with the given start.
func heard(t *testing.T, c *net.UnixConn, until string) []string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}

	var all []string
	for buf := make([]byte, 4096); ; {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("systemd waits for %s: %v; it has heard %q", until, err, all)
		}

		all = append(all, string(buf[:n]))
		if strings.HasPrefix(string(buf[:n]), until) {
			return all
		}
	}
}

// TestStateForSystemd: an engine that is down does not hold up the start, and the status line says
// that it is down before systemd calls the unit started.
func TestStateForSystemd(t *testing.T) {
	notified := systemd(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, configure(t, t.TempDir()), "test", slog.New(slog.DiscardHandler)) }()
	all := heard(t, notified, process.Ready)
	if last := all[len(all)-2]; !strings.HasPrefix(last, "STATUS=Not ready: Docker does not answer") ||
		!strings.Contains(last, "systemctl start docker") || strings.Contains(last, "\n") {
		t.Errorf("before it was ready: %q", all)
	}

	stop()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestHungEngine: an engine that takes the connection and says nothing holds up the start until
// patience ends, and the status line says what is waited for.
func TestHungEngine(t *testing.T) {
	dir, notified := t.TempDir(), systemd(t)
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
	go func() { ended <- ignoreEnd(p.view.Run(ctx)) }()
	begun := make(chan struct{})
	go func() { ended <- p.notifySystemd(ctx, begun) }()
	const patience = 300 * time.Millisecond
	begin := time.Now()
	p.awaitEngine(ctx, patience, isKnown)
	if took := time.Since(begin); took < patience {
		t.Errorf("known within %v", took)
	}

	close(begun)
	if all := heard(t, notified, process.Ready); !strings.HasPrefix(all[0],
		"STATUS=Not ready: not yet connected to Docker") {
		t.Errorf("before it was ready: %q", all)
	}

	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// TestStartWaitsForLogs: whoever is ordered after the daemon finds a node that knows how it logs,
// unless the engine is down or patience ends.
func TestStartWaitsForLogs(t *testing.T) {
	engine := enginetest.NewFake()
	engine.SetDown(true)
	log := slog.New(slog.DiscardHandler)
	p := &parts{view: view.New(engine, log), logs: logs.New(logs.Config{Mode: logs.ModeAuto, Log: log})}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- ignoreEnd(p.view.Run(ctx)) }()
	p.awaitEngine(ctx, time.Hour, isKnown)
	p.awaitLogs(ctx, time.Hour) // the engine is down
	engine.SetDown(false)
	<-p.view.Synced()
	const patience = 300 * time.Millisecond
	begin := time.Now()
	if p.awaitLogs(ctx, patience); time.Since(begin) < patience {
		t.Error("it did not wait")
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
		if got := statusLine(&runtimeapi.RuntimeStatus{Conditions: c}, "29.0"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestHold: calls wait until it is known what runs; those that need the engine's version only do
// not, and none outlives its caller.
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
		t.Errorf("before the first look: %v", err)
	}

	close(p.known)
	if err := p.hold(t.Context(), "ListPodSandbox"); err != nil {
		t.Errorf("after it: %v", err)
	}
}
