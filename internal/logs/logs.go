// Package logs decides how a container's output reaches the path that the kubelet reads: as a file
// in the CRI's format, written by the log-driver process (package driver), or, where the engine
// cannot reach that process, as Docker's json-file behind a symbolic link.
package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

// Modes of --container-log.
const (
	// CRI files if the engine reaches the log-driver process, json-file else
	ModeAuto     = "auto"
	ModeCRI      = "cri"       // CRI files or nothing
	ModeJSONFile = "json-file" // Docker's json-file and a link, as older shims did
)

// Process is the log-driver process as the daemon needs it; see driver.Client.
type Process interface {
	// Watch connects and calls changed with each later status; disconnected is closed when the
	// process ends.
	Watch(ctx context.Context, changed func(driver.Status)) (s driver.Status, disconnected <-chan struct{}, err error)
	// Reopen opens a container's log anew at its path; NotFound if its output is not being written.
	Reopen(ctx context.Context, container string) error
}

// Config is what Logs needs; all is required.
type Config struct {
	Mode    string
	Process Process
	// Launch starts the log-driver process, detached. If that ends before us, ended gets its last
	// words.
	Launch func() (ended <-chan error, err error)
	// Reach asks the engine to make a container with a log driver and remove it. Unavailable means
	// that the engine is down, anything else that it cannot use the driver.
	Reach func(ctx context.Context, c spec.LogConfig) error
	// EngineRoot is the engine's data root, "" while the engine is not known.
	EngineRoot func() string
	Version    string // of this program, to compare with the process's
	Log        *slog.Logger
}

// Logs knows the mode that is active, starts the log-driver process and watches it. It is safe for
// concurrent use.
type Logs struct {
	cfg     Config
	links   *symlinks
	recheck chan struct{}

	decided chan struct{} // closed when active is known

	mu        sync.Mutex // guards all below
	isDecided bool       // decided is closed
	active    string     // ModeCRI, ModeJSONFile or, while nothing can be used, ""
	reason    string     // why it is not the preferred mode, in words
	alarms    string     // shortages of the log-driver process, in words
}

// New returns Logs in the given mode. With ModeAuto and ModeCRI, Run finds out what the engine can
// do.
func New(cfg Config) *Logs {
	l := &Logs{
		cfg:     cfg,
		links:   &symlinks{log: cfg.Log, engineRoot: cfg.EngineRoot},
		recheck: make(chan struct{}, 1),
		decided: make(chan struct{}),
	}
	if cfg.Mode == ModeJSONFile {
		l.set(ModeJSONFile, "")
	}

	return l
}

const (
	launchTimeout = 5 * time.Second // for a process that was started to answer
	launchPoll    = 5 * time.Millisecond
	reachTimeout  = 5 * time.Second // an engine that finds the socket answers in milliseconds
	retryMin      = time.Second
	retryMax      = time.Minute

	retryUnavailable = 5 * time.Second // while the engine does not answer
)

// Run starts the log-driver process when nobody answers on its socket, starts it again when it
// ends, and asks the engine whether it can use it. It returns when ctx ends.
func (l *Logs) Run(ctx context.Context) {
	if l.cfg.Mode == ModeJSONFile {
		return
	}

	for retry := retryMin; ctx.Err() == nil; {
		disconnected, err := l.connect(ctx)
		if err == nil {
			retry = retryMin
			l.ask(ctx, disconnected)
			continue
		}

		if ctx.Err() != nil {
			return
		}

		l.fallBack(err)
		wait(ctx, retry, nil, nil)
		retry = min(2*retry, retryMax)
	}
}

// EngineConnected notes that the engine answers, perhaps another one than before.
func (l *Logs) EngineConnected() {
	select {
	case l.recheck <- struct{}{}:
	default:
	}
}

// connect watches the process, which it starts if nobody answers.
func (l *Logs) connect(ctx context.Context) (disconnected <-chan struct{}, err error) {
	s, disconnected, err := l.cfg.Process.Watch(ctx, l.setAlarms)
	// A daemon that ends while it waits for systemd's process must not leave another one.
	if err != nil && ctx.Err() == nil {
		s, disconnected, err = l.launch(ctx)
	}

	if err != nil {
		return nil, err
	}

	l.setAlarms(s)
	l.cfg.Log.Info("the log-driver process answers", "pid", s.PID, "version", s.Version)
	if s.Version != l.cfg.Version {
		l.cfg.Log.Info("the log-driver process is of another release and goes on; "+
			"end it with SIGTERM to renew it, no line is lost", "pid", s.PID)
	}

	return disconnected, nil
}

// launch starts the process and watches it as soon as it answers.
func (l *Logs) launch(ctx context.Context) (s driver.Status, disconnected <-chan struct{}, err error) {
	ended, err := l.cfg.Launch()
	if err != nil {
		return s, nil, fmt.Errorf("start the log-driver process: %w", err)
	}

	tick := time.NewTicker(launchPoll)
	defer tick.Stop()

	for deadline := time.Now().Add(launchTimeout); ; {
		select {
		case <-ctx.Done():
			return s, nil, ctx.Err()
		case last := <-ended:
			return s, nil, fmt.Errorf("the log-driver process ended at once: %w", last)
		case <-tick.C:
		}

		if s, disconnected, err = l.cfg.Process.Watch(ctx, l.setAlarms); err == nil || time.Now().After(deadline) {
			return s, disconnected, err
		}
	}
}

// ask finds out whether the engine reaches the process, again whenever the engine has been
// connected, until the process has ended.
func (l *Logs) ask(ctx context.Context, disconnected <-chan struct{}) {
	for {
		reachCtx, cancel := context.WithTimeout(ctx, reachTimeout)
		err := l.cfg.Reach(reachCtx, driverConfig("/cri-dockerd-check", "log"))
		cancel()
		again := time.Duration(0)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			l.set(ModeCRI, "")
		// an engine that comes back says so; one that failed this once does not
		case errdefs.IsUnavailable(err):
			again = retryUnavailable
		default:
			l.fallBack(fmt.Errorf("the engine cannot use the log-driver process: %w", err))
			again = retryMax
		}

		if !wait(ctx, again, disconnected, l.recheck) {
			return
		}
	}
}

// wait waits for d (0: for ever), again or ctx's end; it returns false when disconnected is closed
// or ctx has ended.
func wait(ctx context.Context, d time.Duration, disconnected <-chan struct{}, again <-chan struct{}) bool {
	var after <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		after = t.C
	}

	select {
	case <-ctx.Done():
		return false
	case <-disconnected:
		return false
	case <-again:
		return true
	case <-after:
		return true
	}
}

// fallBack uses json-file if the mode allows it.
func (l *Logs) fallBack(why error) {
	if l.cfg.Mode == ModeAuto {
		l.set(ModeJSONFile, why.Error())
	} else {
		l.set("", why.Error())
	}
}

func (l *Logs) set(active, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()

	if l.isDecided && active == l.active {
		l.reason = reason
		return
	}

	l.active, l.reason = active, reason
	if !l.isDecided {
		l.isDecided = true
		close(l.decided)
	}

	switch {
	case reason == "":
		l.cfg.Log.Info("container logs", "mode", active)
	case active == "":
		l.cfg.Log.Error("containers cannot be created without their logs (--container-log=cri)", "reason", reason)
	default:
		l.cfg.Log.Warn("container logs are Docker's json-file behind links; the kubelet's rotation may lose lines",
			"reason", reason)
	}
}

// setAlarms notes what the log-driver process reports of itself.
func (l *Logs) setAlarms(s driver.Status) {
	all := text.Clean(strings.Join(s.Alarms, "; "), text.MaxMessage)
	l.mu.Lock()
	before := l.alarms
	l.alarms = all
	l.mu.Unlock()
	switch {
	case all == before:
	case all == "":
		l.cfg.Log.Info("the log-driver process works as it should again")
	default:
		l.cfg.Log.Warn("the log-driver process works with less than it needs", "alarms", all)
	}
}

// State is the active mode, "" while none is known or can be used, and the reason in words if it is
// not the one to wish for, or if the log-driver process works with less than it needs.
func (l *Logs) State() (active, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()

	if !l.isDecided {
		return "", "it is not yet known whether the engine reaches the log-driver process"
	}
	if l.active == ModeCRI && l.reason == "" {
		return l.active, l.alarms
	}

	return l.active, l.reason
}

// Decided is closed as soon as it is known what the engine can do, and so which mode is active.
func (l *Logs) Decided() <-chan struct{} { return l.decided }

// Config returns the log driver and its options for a container with this log path beneath its
// pod's log directory (both "" if it has none). It waits, at the start only, until it is known what
// the engine can do. Unavailable if CRI files are demanded and cannot be had.
func (l *Logs) Config(ctx context.Context, directory, path string) (spec.LogConfig, error) {
	select {
	case <-l.decided:
	case <-ctx.Done():
		return spec.LogConfig{}, fmt.Errorf("container log: %w", ctx.Err())
	}

	active, reason := l.State()
	switch {
	case active == "":
		return spec.LogConfig{}, fmt.Errorf("container log (--container-log=%s): %s: %w",
			l.cfg.Mode, reason, errdefs.ErrUnavailable)
	case active == ModeJSONFile:
		// Without options: the engine's defaults, which its operator sets in daemon.json (max-size,
		// max-file), hold.
		return spec.LogConfig{Driver: "json-file"}, nil

	case directory == "" || path == "":
		// nobody rotates what has no path; Docker bounds this one by itself
		return spec.LogConfig{Driver: "local"}, nil
	}

	return driverConfig(directory, path), nil
}

func driverConfig(directory, path string) spec.LogConfig {
	return spec.LogConfig{Driver: driver.Name, Options: map[string]string{
		driver.OptionDirectory: filepath.Clean(directory),
		driver.OptionPath:      filepath.Clean(path),
		// docker logs asks the driver; Docker's copy would double the work
		"cache-disabled": "true",
	}}
}

// Started makes the log of a container that has been started, or whose start failed, visible at its
// path.
func (l *Logs) Started(ctx context.Context, c *spec.Container) error {
	if c.LogDriver == driver.Name {
		return nil
	}
	return l.links.started(ctx, c)
}

// Removed removes a container's link. Files stay for their readers; the kubelet removes them
// with the pod.
func (l *Logs) Removed(ctx context.Context, c *spec.Container) error { return l.links.removed(ctx, c) }

// Reopen gives a running container a new log at its path, after the kubelet has renamed the old one
// (CRI ReopenContainerLog). Errors are Unavailable when the log-driver process does not answer,
// FailedPrecondition when the container's log driver has no file.
func (l *Logs) Reopen(ctx context.Context, c *spec.Container) error {
	if c.LogPath == "" {
		return fmt.Errorf("reopen log of container %s: it has no log path: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	if c.LogDriver != driver.Name {
		return l.links.reopen(ctx, c)
	}

	err := l.cfg.Process.Reopen(ctx, string(c.ID))
	if errdefs.IsNotFound(err) { // it runs, so its output is written in a moment
		return errors.Join(fmt.Errorf("reopen log of container %s: %w", c.ID, errdefs.ErrUnavailable), err)
	}

	return err
}
