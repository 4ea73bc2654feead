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

// pollEvery is the interval in which the configuration is read while the kernel does not report its
// changes.
const pollEvery = 3 * time.Second

// confWatch has the kernel report changes of the configuration directory. The kernel's inotify
// instances and watches are shared by all processes of a user, containers among them, so they may
// be used up: the directory then has to be polled, until an instance can be had again. It is safe
// for concurrent use.
type confWatch struct {
	dir        string
	log        *slog.Logger
	newWatcher func() (*fsnotify.Watcher, error)

	mu      sync.Mutex        // guards the rest
	watcher *fsnotify.Watcher // nil while there is none
	problem error             // why changes are not reported, nil if they are
	closed  bool
}

func newConfWatch(dir string, log *slog.Logger) *confWatch {
	return &confWatch{
		dir:        dir,
		log:        log,
		newWatcher: fsnotify.NewWatcher,
	}
}

// update watches the directory, or the nearest one above it that exists, and logs when that begins
// or ends to be impossible.
func (w *confWatch) update() {
	w.mu.Lock()
	defer w.mu.Unlock()

	if w.closed {
		return
	}

	err := w.watchLocked()
	if (err == nil) != (w.problem == nil) {
		if err != nil {
			w.log.Warn("changes of the CNI configuration are not reported by the kernel; the directory is read in "+
				"intervals",
				"dir", w.dir, "interval", pollEvery, "err", err)
		} else {
			w.log.Info("changes of the CNI configuration are reported by the kernel again", "dir", w.dir)
		}
	}

	w.problem = err
}

func (w *confWatch) watchLocked() error {
	if w.watcher == nil {
		watcher, err := w.newWatcher()
		if errors.Is(err, syscall.EMFILE) {
			return fmt.Errorf("inotify instances or file descriptors are used up; raise "+
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
			return fmt.Errorf("inotify watches are used up; raise fs.inotify.max_user_watches: %w", err)
		}

		if missing := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR); missing &&
			dir != filepath.Dir(dir) {
			continue
		}

		if err != nil {
			return fmt.Errorf("inotify: watch %s: %w", dir, err)
		}

		if dir != w.dir { // it may have come between the look and the watch
			if _, err := os.Stat(w.dir); err == nil {
				return w.watcher.Add(w.dir)
			}
		}

		return nil
	}
}

// updates returns the channels of the watcher, nil while there is none.
func (w *confWatch) updates() (<-chan fsnotify.Event, <-chan error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watcher == nil {
		return nil, nil
	}
	return w.watcher.Events, w.watcher.Errors
}

// notice says why the directory is polled, "" if it is not.
func (w *confWatch) notice() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.problem == nil {
		return ""
	}
	return fmt.Sprintf("the CNI configuration is read every %v: %v", pollEvery, w.problem)
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
