package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is the log-driver process and the engine.
type world struct {
	mu       sync.Mutex
	gone     chan struct{} // nil while no process runs
	running  bool          // one runs from the beginning
	slow     bool          // systemd holds the socket and nobody answers
	launch   func() error
	launched int
	dies     chan error // has the last words of a process that ends at once
	reach    error
	reached  []spec.LogConfig
	reopened []string
	reopen   error
	changed  func(driver.Status)
}

func (w *world) Watch(ctx context.Context, changed func(driver.Status)) (driver.Status, <-chan struct{}, error) {
	if w.slow {
		<-ctx.Done()
	}

	w.mu.Lock()
	defer w.mu.Unlock()

	if w.gone == nil {
		return driver.Status{}, nil, fmt.Errorf("log-driver process: %w", errdefs.ErrUnavailable)
	}

	w.changed = changed

	return driver.Status{PID: 7, Version: "old"}, w.gone, nil
}

func (w *world) Reopen(_ context.Context, id string) error {
	w.reopened = append(w.reopened, id)
	return w.reopen
}

// run starts the process.
func (w *world) run() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gone = make(chan struct{})
}

// kill ends it.
func (w *world) kill() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.gone)
	w.gone = nil
}

func (w *world) setReach(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reach = err
}

func (w *world) logs(mode string) *Logs {
	return New(Config{
		Mode:    mode,
		Process: w,
		Version: "new",
		Log:     slog.New(slog.DiscardHandler),
		Launch: func() (<-chan error, error) {
			w.launched++
			return w.dies, w.launch()
		},
		Reach: func(_ context.Context, c spec.LogConfig) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.reached = append(w.reached, c)
			return w.reach
		},
	})
}

// settle lets a process that was launched answer.
func settle() {
	time.Sleep(10 * launchPoll)
	synctest.Wait()
}

// inBubble runs a test with Logs that run, in a world whose time is free.
func inBubble(t *testing.T, mode string, w *world, test func(t *testing.T, l *Logs)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		if w.launch == nil {
			w.launch = func() error { w.run(); return nil }
		}
		if w.running {
			w.run()
		}

		l := w.logs(mode)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); l.Run(ctx) }()
		test(t, l)
		cancel()
		<-ended
	})
}

func expect(t *testing.T, l *Logs, active, reason, driverName string) {
	t.Helper()
	gotActive, gotReason := l.State()
	if gotActive != active || !strings.Contains(gotReason, reason) || (reason == "") != (gotReason == "") {
		t.Errorf("state %q, %q; want %q, %q", gotActive, gotReason, active, reason)
	}

	c, err := l.Config(t.Context(), "/var/log/pods/p", "main/0.log")
	if driverName == "" {
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), reason) {
			t.Errorf("Config: %v, %v", c, err)
		}
		return
	}

	if err != nil || c.Driver != driverName {
		t.Errorf("Config: %v, %v; want %s", c, err, driverName)
	}
}

// TestAlarms: what the process reports of itself is the reason that the status shows, in text that
// fits there, and does not keep containers from being created.
func TestAlarms(t *testing.T) {
	w := &world{}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		w.changed(driver.Status{Alarms: []string{"pipe pages are used up\x1b[2J", strings.Repeat("x", 100000)}})
		expect(t, l, ModeCRI, "pipe pages are used up", driver.Name)
		if _, reason := l.State(); len(reason) > text.MaxMessage || strings.ContainsRune(reason, 0x1b) {
			t.Errorf("the reason is %.50q, %d bytes", reason, len(reason))
		}

		w.changed(driver.Status{})
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

func TestAutoUsesTheDriver(t *testing.T) {
	w := &world{}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
		c, err := l.Config(t.Context(), "/var/log/pods/p/", "main//0.log")
		if err != nil || fmt.Sprint(c.Options) != "map[cache-disabled:true directory:/var/log/pods/p path:main/0.log]" {
			t.Errorf("%v, %v", c, err)
		}

		for _, none := range [][2]string{{"", "main/0.log"}, {"/var/log/pods/p", ""}} {
			if c, err := l.Config(t.Context(), none[0], none[1]); err != nil || c.Driver != "local" ||
				c.Options != nil {
				t.Errorf("without a path: %v, %v", c, err)
			}
		}

		for range 3 { // it is killed, and runs again at once
			w.kill()
			settle()
			expect(t, l, ModeCRI, "", driver.Name)
		}

		if w.launched != 4 {
			t.Errorf("launched %d times", w.launched)
		}
	})
}

func TestAutoFindsTheProcessThatRuns(t *testing.T) {
	w := &world{running: true}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		if w.launched != 0 {
			t.Error("a second one was launched")
		}
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

// TestNothingIsLaunchedAtTheEnd: a daemon that is stopped while it waits for systemd's process
// leaves no other one behind.
func TestNothingIsLaunchedAtTheEnd(t *testing.T) {
	w := &world{slow: true}
	inBubble(t, ModeAuto, w, func(*testing.T, *Logs) { settle() })
	if w.launched != 0 {
		t.Errorf("launched %d times", w.launched)
	}
}

func TestAutoFallsBack(t *testing.T) {
	dying := make(chan error, 1)
	dying <- errors.New("exit status 1: read-only file system")
	for name, w := range map[string]*world{
		"cannot be started":    {launch: func() error { return errors.New("no such file") }},
		"does not answer":      {launch: func() error { return nil }},
		"cannot be reached by": {reach: errors.New("no log driver named cri-dockerd")},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
				c, err := l.Config(t.Context(), "/d", "p") // waits until it is known
				if err != nil || c.Driver != "json-file" || c.Options != nil {
					t.Errorf("%v, %v", c, err)
				}

				expect(t, l, ModeJSONFile, "log-driver process", "json-file")
				// Whatever it was is mended.
				w.mu.Lock()
				w.reach, w.launch = nil, func() error { w.run(); return nil }
				w.mu.Unlock()
				time.Sleep(retryMax + time.Second)
				synctest.Wait()
				expect(t, l, ModeCRI, "", driver.Name)
			})
		})
	}
}

func TestCRIOrNothing(t *testing.T) {
	w := &world{reach: errors.New("no log driver named cri-dockerd")}
	inBubble(t, ModeCRI, w, func(t *testing.T, l *Logs) {
		settle()
		expect(t, l, "", "no log driver named", "")
		w.setReach(nil)
		l.EngineConnected()
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

func TestUndecidedWhileTheEngineIsDown(t *testing.T) {
	w := &world{reach: errdefs.ErrUnavailable}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		if active, reason := l.State(); active != "" || reason == "" {
			t.Errorf("state %q, %q", active, reason)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()

		if c, err := l.Config(ctx, "/d", "p"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %v", c, err)
		}

		w.setReach(nil)
		l.EngineConnected()
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
		w.setReach(errdefs.ErrUnavailable) // it restarts; what was known stays
		l.EngineConnected()
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

// TestOneFailureSettlesNothing: an engine that does not answer once, and was never away, is asked
// again.
func TestOneFailureSettlesNothing(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeCRI} {
		w := &world{running: true, reach: fmt.Errorf("connection reset: %w", errdefs.ErrUnavailable)}
		inBubble(t, mode, w, func(t *testing.T, l *Logs) {
			settle()
			w.setReach(nil)
			time.Sleep(retryUnavailable)
			expect(t, l, ModeCRI, "", driver.Name)
		})
	}
}

func TestJSONFileNeedsNobody(t *testing.T) {
	w := &world{}
	inBubble(t, ModeJSONFile, w, func(t *testing.T, l *Logs) {
		settle()
		expect(t, l, ModeJSONFile, "", "json-file")
		l.EngineConnected()
		if w.launched != 0 || len(w.reached) != 0 {
			t.Error("the log-driver process is asked for")
		}
	})
}

func TestReopenAsksWhoWrites(t *testing.T) {
	w := &world{}
	l := w.logs(ModeJSONFile)
	ours := &spec.Container{ID: "aa", LogPath: "/var/log/pods/p/0.log", LogDriver: driver.Name}
	if err := l.Reopen(t.Context(), ours); err != nil || fmt.Sprint(w.reopened) != "[aa]" {
		t.Errorf("%v, %v", w.reopened, err)
	}

	w.reopen = errdefs.ErrNotFound
	if err := l.Reopen(t.Context(), ours); !errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) &&
		!errdefs.IsUnavailable(err) {
		t.Errorf("a container that runs and is not written: %v", err)
	}

	if err := l.Reopen(t.Context(), &spec.Container{ID: "bb"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a path: %v", err)
	}

	if err := l.Reopen(t.Context(), &spec.Container{
		ID:        "bb",
		LogPath:   "/x",
		LogDriver: "journald",
	}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("of another driver: %v", err)
	}

	if err := errors.Join(l.Started(t.Context(), ours), l.Removed(t.Context(), ours)); err != nil {
		t.Error(err)
	}
}
