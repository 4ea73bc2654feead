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
		bitten := make(chan string, 1)
		w := newWatchdog(time.Minute, &movement{}, func(last string) { bitten <- last })
		for i := range 10 {
			time.Sleep(50 * time.Second)
			w.saw("layer1", fmt.Sprint("Extracting ", i), turnCame)
		}

		select {
		case l := <-bitten:
			t.Errorf("it bit while things moved: %s", l)
		default:
		}

		for range 61 { // an engine that repeats itself
			time.Sleep(time.Second)
			w.saw("layer1", "Extracting 9", turnCame)
		}

		synctest.Wait()
		if l := <-bitten; l != "layer1 Extracting 9" {
			t.Errorf("last: %s", l)
		}

		w.stop()
		newWatchdog(0, &movement{}, nil).stop() // no deadline
	})
}

// TestTurn: what a pull waits for, by what engines say of its layers. A layer that is worked on
// counts, whatever the others do.
func TestTurn(t *testing.T) {
	for name, test := range map[string]struct {
		messages [][2]string // layer and status
		want     turn
	}{
		"nothing":  {nil, turnUnknown},
		"the name": {[][2]string{{"1", "Pulling from app"}}, turnUnknown},
		"20.10, in the queue": {[][2]string{{"1", "Pulling from app"}, {"a", "Pulling fs layer"},
			{"b", "Pulling fs layer"}, {"a", "Waiting"}, {"b", "Waiting"}}, turnQueued},
		"20.10, the rest waits": {[][2]string{{"a", "Already exists"}, {"b", "Pulling fs layer"}, {"b", "Waiting"}},
			turnQueued},
		"20.10, one connects": {[][2]string{{"a", "Pulling fs layer"}, {"b", "Pulling fs layer"},
			{"b", "Waiting"}}, turnCame},
		"20.10, one is on its way": {[][2]string{{"a", "Downloading"}, {"b", "Waiting"}}, turnCame},
		"20.10, tries again":       {[][2]string{{"a", "Retrying in 5 seconds"}, {"b", "Waiting"}}, turnCame},
		"29, announced":            {[][2]string{{"a", "Pulling fs layer"}, {"b", "Pulling fs layer"}}, turnUnknown},
		"29, the rest waits": {[][2]string{{"a", "Pull complete"}, {"b", "Download complete"},
			{"c", "Pulling fs layer"}}, turnUnknown},
		"29, one is on its way": {[][2]string{{"a", "Downloading"}, {"b", "Pulling fs layer"}}, turnCame},
		"29, one is unpacked":   {[][2]string{{"a", "Extracting"}, {"b", "Pulling fs layer"}}, turnCame},
	} {
		p := newProgress(newWatchdog(0, &movement{}, nil), slog.New(slog.DiscardHandler), newPullMetrics())
		for _, m := range test.messages {
			p.saw(jsonstream.Message{ID: m[0], Status: m[1]})
		}
		if got := p.turn(); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

// TestWatchdogInTheQueue: a pull whose turn has not come waits as long as the engine says so, or as
// another one moves.
func TestWatchdogInTheQueue(t *testing.T) {
	const after = time.Minute
	for name, test := range map[string]struct {
		turn  turn
		moves bool // another pull
		bites bool
	}{
		"queued":                      {turnQueued, false, false},
		"unknown, another pull moves": {turnUnknown, true, false},
		"unknown, nothing moves":      {turnUnknown, false, true},
		"came, another pull moves":    {turnCame, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var bitten atomic.Bool
				all := &movement{}
				w := newWatchdog(after, all, func(string) { bitten.Store(true) })
				defer w.stop()

				w.saw("layer", "Pulling fs layer", test.turn)
				for range 10 {
					time.Sleep(after / 2)
					if test.moves {
						all.note()
					}
				}

				synctest.Wait()
				if bitten.Load() != test.bites {
					t.Errorf("bitten: %v", bitten.Load())
				}

				if test.turn == turnUnknown && !test.bites { // the others have ended
					time.Sleep(2*after + time.Second)
					synctest.Wait()
					if !bitten.Load() {
						t.Error("it waits although nothing moves any more")
					}
				}
			})
		})
	}
}

// TestMovementOnDisk: bytes that containerd writes are progress of any pull.
func TestMovementOnDisk(t *testing.T) {
	root := t.TempDir()
	m := &movement{}
	if m.store.Store(&root); m.since() < time.Hour {
		t.Errorf("nothing has moved for %s only", m.since())
	}

	dir := filepath.Join(root, "containerd/daemon", ingests, "0123")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(dir, "data"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	if m.since() > time.Minute {
		t.Errorf("nothing has moved for %s", m.since())
	}
}
