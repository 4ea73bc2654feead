package engine

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/jsonstream"
)

func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		expired := make(chan string, 1)
		w := newWatchdog(time.Minute, &activity{}, func(last string) { expired <- last })
		for i := range 10 {
			time.Sleep(50 * time.Second)
			w.observe("layer1", fmt.Sprint("Extracting ", i), pullActive)
		}

		select {
		case l := <-expired:
			t.Errorf("watchdog expired despite progress: %s", l)
		default:
		}

		for range 61 { // the engine repeats a message
			time.Sleep(time.Second)
			w.observe("layer1", "Extracting 9", pullActive)
		}

		synctest.Wait()
		if l := <-expired; l != "layer1 Extracting 9" {
			t.Errorf("last progress %q, want \"layer1 Extracting 9\"", l)
		}

		w.stop()
		newWatchdog(0, &activity{}, nil).stop() // no timeout
	})
}

// TestPullState derives the state of a pull from messages of real engines. A pull with an active
// layer is active.
func TestPullState(t *testing.T) {
	type messages [][2]string // layer and status
	for name, test := range map[string]struct {
		messages messages
		want     pullState
	}{
		"no message": {nil, pullUnknown},
		"name only":  {messages{{"1", "Pulling from app"}}, pullUnknown},
		"20.10, queued": {
			messages{{"1", "Pulling from app"}, {"a", "Pulling fs layer"}, {"b", "Pulling fs layer"},
				{"a", "Waiting"}, {"b", "Waiting"}},
			pullQueued,
		},
		"20.10, remaining layer queued": {
			messages{{"a", "Already exists"}, {"b", "Pulling fs layer"}, {"b", "Waiting"}},
			pullQueued,
		},
		"20.10, one connects": {
			messages{{"a", "Pulling fs layer"}, {"b", "Pulling fs layer"}, {"b", "Waiting"}},
			pullActive,
		},
		"20.10, one downloads": {messages{{"a", "Downloading"}, {"b", "Waiting"}}, pullActive},
		"20.10, one retries":   {messages{{"a", "Retrying in 5 seconds"}, {"b", "Waiting"}}, pullActive},
		"29, announced":        {messages{{"a", "Pulling fs layer"}, {"b", "Pulling fs layer"}}, pullUnknown},
		"29, remaining layer announced": {
			messages{{"a", "Pull complete"}, {"b", "Download complete"}, {"c", "Pulling fs layer"}},
			pullUnknown,
		},
		"29, one downloads":    {messages{{"a", "Downloading"}, {"b", "Pulling fs layer"}}, pullActive},
		"29, one is extracted": {messages{{"a", "Extracting"}, {"b", "Pulling fs layer"}}, pullActive},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProgress(newWatchdog(0, &activity{}, nil), slog.New(slog.DiscardHandler), newPullMetrics())
			for _, m := range test.messages {
				p.observe(jsonstream.Message{ID: m[0], Status: m[1]})
			}

			if got := p.state(); got != test.want {
				t.Errorf("state %d, want %d", got, test.want)
			}
		})
	}
}

// TestWatchdogWhileQueued checks that a queued pull waits while the engine reports the queue, or
// while another pull progresses.
func TestWatchdogWhileQueued(t *testing.T) {
	const timeout = time.Minute
	for name, test := range map[string]struct {
		state      pullState
		progresses bool // another pull
		expires    bool
	}{
		"queued":                           {pullQueued, false, false},
		"unknown, another pull progresses": {pullUnknown, true, false},
		"unknown, no progress":             {pullUnknown, false, true},
		"active, another pull progresses":  {pullActive, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var expired atomic.Bool
				all := &activity{}
				w := newWatchdog(timeout, all, func(string) { expired.Store(true) })
				defer w.stop()

				w.observe("layer", "Pulling fs layer", test.state)
				for range 10 {
					time.Sleep(timeout / 2)
					if test.progresses {
						all.record()
					}
				}

				synctest.Wait()
				if expired.Load() != test.expires {
					t.Errorf("expired: %v, want %v", expired.Load(), test.expires)
				}

				if test.state == pullUnknown && !test.expires { // the other pulls have ended
					time.Sleep(2*timeout + time.Second)
					synctest.Wait()
					if !expired.Load() {
						t.Error("watchdog has not expired although no pull progresses")
					}
				}
			})
		})
	}
}

// TestActivityOnDisk checks that bytes written by containerd count as progress.
func TestActivityOnDisk(t *testing.T) {
	root := t.TempDir()
	a := &activity{}
	if a.store.Store(&root); a.idleTime() < time.Hour {
		t.Errorf("idle time %s without any download", a.idleTime())
	}

	dir := filepath.Join(root, "containerd/daemon", ingests, "0123")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(dir, "data"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	if a.idleTime() > time.Minute {
		t.Errorf("idle time %s after a write", a.idleTime())
	}
}
