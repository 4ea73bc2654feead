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
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world fakes the log-driver process and the engine.
type world struct {
	mu           sync.Mutex
	disconnected chan struct{} // nil while no process runs
	running      bool          // the process runs from the beginning
	slow         bool          // systemd holds the socket without a process
	launch       func() error
	launched     int
	dies         chan error // has the error of a process that ends at once
	reach        error
	reachTime    time.Duration // of the check, unless its context ends before
	reached      []model.LogConfig
	reopened     []string
	reopen       error
	changed      func(driver.Status)
}

func (w *world) Watch(ctx context.Context, changed func(driver.Status)) (driver.Status, <-chan struct{}, error) {
	if w.slow {
		<-ctx.Done()
	}

	w.mu.Lock()
	defer w.mu.Unlock()

	if w.disconnected == nil {
		return driver.Status{}, nil, fmt.Errorf("log-driver process: %w", errdefs.ErrUnavailable)
	}

	w.changed = changed

	return driver.Status{PID: 7, Version: "old"}, w.disconnected, nil
}

func (w *world) Reopen(_ context.Context, id string) error {
	w.reopened = append(w.reopened, id)
	return w.reopen
}

// run starts the process.
func (w *world) run() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disconnected = make(chan struct{})
}

// kill ends the process.
func (w *world) kill() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.disconnected)
	w.disconnected = nil
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
		Reach: func(ctx context.Context, c model.LogConfig) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(w.reachTime):
			}

			w.mu.Lock()
			defer w.mu.Unlock()
			w.reached = append(w.reached, c)
			return w.reach
		},
	})
}

// settle waits for a launched process to respond.
func settle() {
	time.Sleep(10 * launchPoll)
	synctest.Wait()
}

// inBubble runs a test with running Logs in virtual time.
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

// TestAlarms expects the alarms of the process as the reason in the status, cleaned and bounded.
// They must not prevent the creation of containers.
func TestAlarms(t *testing.T) {
	w := &world{}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		w.changed(driver.Status{Alarms: []string{"pipe pages are exhausted\x1b[2J", strings.Repeat("x", 100000)}})
		expect(t, l, ModeCRI, "pipe pages are exhausted", driver.Name)
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
			t.Errorf("Config: %v, %v", c, err)
		}

		for _, none := range [][2]string{{"", "main/0.log"}, {"/var/log/pods/p", ""}} {
			if c, err := l.Config(t.Context(), none[0], none[1]); err != nil || c.Driver != "local" ||
				c.Options != nil {
				t.Errorf("without a path: %v, %v", c, err)
			}
		}

		for range 3 { // killed, and restarted at once
			w.kill()
			settle()
			expect(t, l, ModeCRI, "", driver.Name)
		}

		if w.launched != 4 {
			t.Errorf("launched %d times", w.launched)
		}
	})
}

func TestAutoFindsRunningProcess(t *testing.T) {
	w := &world{running: true}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		if w.launched != 0 {
			t.Error("a second process was launched")
		}
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

// TestStopLaunchesNothing expects a daemon stopped while it waits for systemd's process to launch
// no other one.
func TestStopLaunchesNothing(t *testing.T) {
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
				c, err := l.Config(t.Context(), "/d", "p") // waits for the decision
				if err != nil || c.Driver != "json-file" || c.Options != nil {
					t.Errorf("Config: %v, %v; want json-file without options", c, err)
				}

				expect(t, l, ModeJSONFile, "log-driver process", "json-file")
				// The cause is fixed.
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

func TestCRIWithoutFallback(t *testing.T) {
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
			t.Errorf("Config while undecided: %v, error %v, want a timeout", c, err)
		}

		w.setReach(nil)
		l.EngineConnected()
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
		w.setReach(errdefs.ErrUnavailable) // it restarts; the decision remains
		l.EngineConnected()
		settle()
		expect(t, l, ModeCRI, "", driver.Name)
	})
}

// TestSlowCheck expects the mode to stay undecided while the engine takes a minute for the check,
// as for the first load of the pause image, and containers to wait for the decision.
func TestSlowCheck(t *testing.T) {
	w := &world{running: true, reachTime: time.Minute}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		time.Sleep(w.reachTime - time.Second)
		if active, reason := l.State(); active != "" || reason == "" {
			t.Errorf("state %q, %q, want none yet", active, reason)
		}

		c, err := l.Config(t.Context(), "/var/log/pods/p", "main/0.log") // waits for the decision
		if err != nil || c.Driver != driver.Name {
			t.Errorf("Config: %v, %v; want %s", c, err, driver.Name)
		}
	})
}

// TestUnfinishedCheck expects the reason of an undecided mode in the status and in the errors of
// containers that wait for the decision.
func TestUnfinishedCheck(t *testing.T) {
	w := &world{running: true, reach: fmt.Errorf("no space left: %w", errdefs.ErrUnavailable)}
	inBubble(t, ModeAuto, w, func(t *testing.T, l *Logs) {
		settle()
		if active, reason := l.State(); active != "" || !strings.Contains(reason, "no space left") {
			t.Errorf("state %q, %q, want the reason", active, reason)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()

		if c, err := l.Config(ctx, "/d", "p"); !errors.Is(err, context.DeadlineExceeded) ||
			!strings.Contains(err.Error(), "no space left") {
			t.Errorf("Config while undecided: %v, error %v, want a timeout and the reason", c, err)
		}
	})
}

// TestOneFailureIsRetried expects another check of an engine after one failed call without a
// disconnect.
func TestOneFailureIsRetried(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeCRI} {
		t.Run(mode, func(t *testing.T) {
			w := &world{running: true, reach: fmt.Errorf("connection reset: %w", errdefs.ErrUnavailable)}
			inBubble(t, mode, w, func(t *testing.T, l *Logs) {
				settle()
				w.setReach(nil)
				time.Sleep(retryUnavailable)
				expect(t, l, ModeCRI, "", driver.Name)
			})
		})
	}
}

func TestJSONFileNeedsNoProcess(t *testing.T) {
	w := &world{}
	inBubble(t, ModeJSONFile, w, func(t *testing.T, l *Logs) {
		settle()
		expect(t, l, ModeJSONFile, "", "json-file")
		l.EngineConnected()
		if w.launched != 0 || len(w.reached) != 0 {
			t.Error("the log-driver process was launched or the engine checked")
		}
	})
}

func TestReopenUsesTheWriter(t *testing.T) {
	w := &world{}
	l := w.logs(ModeJSONFile)
	ours := &model.Container{ID: "aa", LogPath: "/var/log/pods/p/0.log", LogDriver: driver.Name}
	if err := l.Reopen(t.Context(), ours); err != nil || fmt.Sprint(w.reopened) != "[aa]" {
		t.Errorf("reopened %v, error %v", w.reopened, err)
	}

	w.reopen = errdefs.ErrNotFound
	if err := l.Reopen(t.Context(), ours); !errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) &&
		!errdefs.IsUnavailable(err) {
		t.Errorf("running container without a stream: error %v, want Unavailable", err)
	}

	if err := l.Reopen(t.Context(), &model.Container{ID: "bb"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a path: error %v, want FailedPrecondition", err)
	}

	if err := l.Reopen(t.Context(), &model.Container{
		ID:        "bb",
		LogPath:   "/x",
		LogDriver: "journald",
	}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another log driver: error %v, want FailedPrecondition", err)
	}

	if err := errors.Join(l.Started(t.Context(), ours), l.Removed(t.Context(), ours)); err != nil {
		t.Error(err)
	}
}
