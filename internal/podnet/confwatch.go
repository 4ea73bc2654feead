package podnet

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// pollEvery is the interval for reading the configuration while inotify is unavailable.
const pollEvery = 3 * time.Second

// confWatch watches the configuration directory with inotify. All processes of a user, including
// containers, share the kernel's limits of inotify instances and watches. When they are exhausted,
// the directory is polled until an instance becomes available. It is safe for concurrent use.
type confWatch struct {
	dir        string
	log        *slog.Logger
	newWatcher func() (*fsnotify.Watcher, error)

	mu      sync.Mutex        // guards the fields below
	watcher *fsnotify.Watcher // nil if there is none
	problem error             // why inotify is unavailable, or nil
	closed  bool
}

func newConfWatch(dir string, log *slog.Logger) *confWatch {
	return &confWatch{
		dir:        dir,
		log:        log,
		newWatcher: fsnotify.NewWatcher,
	}
}

// update watches the directory, or its nearest existing parent. It logs when inotify becomes
// unavailable or available again.
func (w *confWatch) update() {
	w.mu.Lock()
	defer w.mu.Unlock()

	if w.closed {
		return
	}

	err := w.watchLocked()
	if (err == nil) != (w.problem == nil) {
		if err != nil {
			w.log.Warn("cannot watch the CNI configuration; polling the directory",
				"dir", w.dir, "interval", pollEvery, "err", err)
		} else {
			w.log.Info("watching the CNI configuration again", "dir", w.dir)
		}
	}

	w.problem = err
}

func (w *confWatch) watchLocked() error {
	if w.watcher == nil {
		watcher, err := w.newWatcher()
		if errors.Is(err, syscall.EMFILE) {
			return fmt.Errorf("inotify instances or file descriptors are exhausted; increase "+
				"fs.inotify.max_user_instances: %w", err)
		}

		if err != nil {
			return fmt.Errorf("inotify: %w", err)
		}

		w.watcher = watcher
	}

	for dir := w.dir; ; dir = filepath.Dir(dir) {
		err := w.watcher.Add(dir)
		if errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("inotify watches are exhausted; increase fs.inotify.max_user_watches: %w", err)
		}

		if missing := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR); missing &&
			dir != filepath.Dir(dir) {
			continue
		}

		if err != nil {
			return fmt.Errorf("inotify: watch %s: %w", dir, err)
		}

		if dir != w.dir { // the directory may have been created before the watch
			if _, err := os.Stat(w.dir); err == nil {
				return w.watcher.Add(w.dir)
			}
		}

		return nil
	}
}

// updates returns the channels of the watcher, nil if there is none.
func (w *confWatch) updates() (<-chan fsnotify.Event, <-chan error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watcher == nil {
		return nil, nil
	}
	return w.watcher.Events, w.watcher.Errors
}

// notice returns the reason for polling the directory, "" if it is watched.
func (w *confWatch) notice() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.problem == nil {
		return ""
	}
	return fmt.Sprintf("the CNI configuration is polled every %v: %v", pollEvery, w.problem)
}

func (w *confWatch) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Close()
}
