package podnet

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/fsnotify/fsnotify"
)

// shortage simulates a kernel without free inotify instances until over is set.
type shortage struct{ over atomic.Bool }

func (s *shortage) watcher() (*fsnotify.Watcher, error) {
	if !s.over.Load() {
		return nil, syscall.EMFILE
	}
	return fsnotify.NewWatcher()
}

// TestInotifyUsedUp polls the configuration without an inotify instance, logs this once and shows
// it in the status, until an instance becomes available.
func TestInotifyUsedUp(t *testing.T) {
	f := newFake(t)
	conf := t.TempDir()
	var log lockedBuffer
	var kernel shortage
	c, err := NewCNI(CNIConfig{
		ConfDir:  conf,
		BinDirs:  []string{f.dir},
		CacheDir: t.TempDir(),
		Log:      slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}

	first := c.watch
	c.watch = newConfWatch(conf, c.cfg.Log)
	c.watch.newWatcher = kernel.watcher
	if err := first.close(); err != nil {
		t.Fatal(err)
	}

	c.watch.update()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); c.Close() })
	if notice := c.Notice(); !strings.Contains(notice, "fs.inotify.max_user_instances") {
		t.Errorf("notice %q", notice)
	}

	writeConf(t, filepath.Join(conf, "10.conflist"), "net", "1.0.0")
	if !within(func() bool { return c.Ready() == nil }) {
		t.Fatal("the configuration is never read")
	}

	for range 3 {
		c.Reload(t.Context())
	}

	if n := strings.Count(log.String(), "polling the directory"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}

	kernel.over.Store(true)
	if !within(func() bool { return c.Notice() == "" }) {
		t.Fatal("no inotify instance is ever used")
	}
	if !strings.Contains(log.String(), "watching the CNI configuration again") {
		t.Errorf("the log does not report the end of the shortage:\n%s", log.String())
	}
	if err := os.Remove(filepath.Join(conf, "10.conflist")); err != nil {
		t.Fatal(err)
	}

	if !within(func() bool { return c.Ready() != nil }) {
		t.Fatal("the change is never reported")
	}
}

// lockedBuffer is a log for concurrent reads and writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
