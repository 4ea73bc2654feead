package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cri-dockerd/internal/config"
)

// descriptors returns the number of open descriptors by file or kind.
func descriptors(t *testing.T) map[string]int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}

	out := map[string]int{}
	for _, f := range all {
		if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil {
			kind, _, _ := strings.Cut(to, ":[") // for example socket:[1234]
			out[kind]++
		}
	}

	return out
}

// configureAll returns a configuration with a resource for every step of wire.
func configureAll(t *testing.T, dir string) *config.Config {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "net.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	return configure(t, dir, "--tracing-endpoint=127.0.0.1:1")
}

// TestWireErrors fails each step of wire in turn. No goroutine, descriptor or socket may remain.
func TestWireErrors(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	warm, err := wire(configureAll(t, t.TempDir()), "test", log) // opens permanent descriptors of the Go runtime
	if err != nil {
		t.Fatal(err)
	}

	if err := warm.close(); err != nil {
		t.Fatal(err)
	}

	boom := errors.New("boom")
	for i := range len(warm.steps()) + 1 {
		t.Run(fmt.Sprint("step ", i), func(t *testing.T) {
			dir := t.TempDir()
			p := newParts(configureAll(t, dir), "test", log)
			before, running := descriptors(t), goleak.IgnoreCurrent()
			acquired := false
			err := p.acquire(append(p.steps()[:i:i], func() error {
				acquired = i == 0 || !maps.Equal(before, descriptors(t)) || goleak.Find(running) != nil
				return boom
			}))
			if !errors.Is(err, boom) || err.Error() != boom.Error() {
				t.Errorf("error %v", err)
			}

			if !acquired {
				t.Error("the steps acquired no resources")
			}

			if err := goleak.Find(running); err != nil {
				t.Errorf("a part is still running: %v", err)
			}

			deadline := time.Now().Add(20 * time.Second)
			// connections close asynchronously
			for !maps.Equal(before, descriptors(t)) && time.Now().Before(deadline) {
				time.Sleep(time.Millisecond)
			}

			if after := descriptors(t); !maps.Equal(before, after) {
				t.Errorf("descriptors before %v, after %v", before, after)
			}

			for _, name := range []string{"cri.sock", "metrics.sock"} {
				if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s remains: %v", name, err)
				}
			}
		})
	}
}
