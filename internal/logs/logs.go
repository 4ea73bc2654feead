// Package logs selects the way of a container's output to the kubelet's log path. The default is a
// file in the CRI's format, written by the log-driver process (package driver). If the engine
// cannot reach that process, the package falls back to Docker's json-file behind a symbolic link.
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
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// Modes of --container-log.
const (
	// ModeAuto uses CRI files if the engine reaches the log-driver process, and json-file
	// otherwise.
	ModeAuto     = "auto"
	ModeCRI      = "cri"       // CRI files only
	ModeJSONFile = "json-file" // Docker's json-file behind a link, as in older shims
)

// Process is the daemon's interface to the log-driver process. See driver.Client.
type Process interface {
	// Watch connects and calls changed with each later status. It closes disconnected when the
	// process ends.
	Watch(ctx context.Context, changed func(driver.Status)) (s driver.Status, disconnected <-chan struct{}, err error)
	// Reopen closes a container's log and opens a new one at its path. It returns NotFound for a
	// container without a log stream.
	Reopen(ctx context.Context, container string) error
}

// Config configures Logs. All fields are required.
type Config struct {
	Mode    string
	Process Process
	// Launch starts the log-driver process, detached. If the process ends before this one, ended
	// receives its last line of output.
	Launch func() (ended <-chan error, err error)
	// Reach verifies the log driver: it makes the engine create and remove a container with it. It
	// limits each of its steps. Unavailable means that nothing is known about the driver, because
	// the engine is down or another step failed. Any other error means that the engine cannot use
	// the driver.
	Reach func(ctx context.Context, c model.LogConfig) error
	// EngineRoot returns the engine's data root, or "" before it is known.
	EngineRoot func() string
	Version    string // this program's version, to compare with the process's
	Log        *slog.Logger
}

// Logs starts and watches the log-driver process, and knows the active mode. It is safe for
// concurrent use.
type Logs struct {
	cfg     Config
	links   *symlinks
	recheck chan struct{}

	decided chan struct{} // closed when the mode is decided

	mu        sync.Mutex // guards the fields below
	isDecided bool       // decided is closed
	unchecked string     // the reason for an undecided mode
	active    string     // ModeCRI, ModeJSONFile, or "" if neither is usable
	reason    string     // the reason for not using the preferred mode
	alarms    string     // shortages of the log-driver process, as sentences
}

// New returns Logs in the given mode. With ModeAuto and ModeCRI, Run determines the engine's
// capabilities.
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
	launchTimeout = 5 * time.Second // for a started process to respond
	launchPoll    = 5 * time.Millisecond
	retryMin      = time.Second
	retryMax      = time.Minute

	retryUnavailable = 5 * time.Second // while the engine is unavailable
)

// Run starts the log-driver process if none responds on its socket, and restarts it when it ends.
// It checks whether the engine can use the process. It returns when ctx ends.
func (l *Logs) Run(ctx context.Context) {
	if l.cfg.Mode == ModeJSONFile {
		return
	}

	for retry := retryMin; ctx.Err() == nil; {
		disconnected, err := l.connect(ctx)
		if err == nil {
			retry = retryMin
			l.checkEngine(ctx, disconnected)
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

// EngineConnected reports that the engine is connected. It may be another engine than before.
func (l *Logs) EngineConnected() {
	select {
	case l.recheck <- struct{}{}:
	default:
	}
}

// connect watches the process, and launches one if none responds.
func (l *Logs) connect(ctx context.Context) (disconnected <-chan struct{}, err error) {
	s, disconnected, err := l.cfg.Process.Watch(ctx, l.setAlarms)
	// A daemon stopped while it waits for systemd's process must not launch another one.
	if err != nil && ctx.Err() == nil {
		s, disconnected, err = l.launch(ctx)
	}

	if err != nil {
		return nil, err
	}

	l.setAlarms(s)
	l.cfg.Log.Info("connected to the log-driver process", "pid", s.PID, "version", s.Version)
	if s.Version != l.cfg.Version {
		l.cfg.Log.Info("the log-driver process runs another release; "+
			"send it SIGTERM to replace it, no lines are lost", "pid", s.PID)
	}

	return disconnected, nil
}

// launch starts the process and watches it as soon as it responds.
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

// checkEngine checks whether the engine reaches the process, and again each time the engine
// connects. It returns when the process ends.
func (l *Logs) checkEngine(ctx context.Context, disconnected <-chan struct{}) {
	for {
		err := l.cfg.Reach(ctx, newDriverConfig("/cri-dockerd-check", "log"))
		again := time.Duration(0)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			l.set(ModeCRI, "")
		// A returning engine triggers a check. An engine that failed only this call does not.
		case errdefs.IsUnavailable(err):
			l.setUnchecked(err)
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

// wait waits for d (0: no limit), for again, or for the end of ctx. It returns false when
// disconnected is closed or ctx has ended.
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

// fallBack selects json-file if the mode permits it.
func (l *Logs) fallBack(cause error) {
	if l.cfg.Mode == ModeAuto {
		l.set(ModeJSONFile, cause.Error())
	} else {
		l.set("", cause.Error())
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
		l.cfg.Log.Info("selected the mode of container logs", "mode", active)
	case active == "":
		l.cfg.Log.Error("cannot create containers: their logs cannot be written (--container-log=cri)",
			"reason", reason)
	default:
		l.cfg.Log.Warn("falling back to Docker's json-file for container logs; log rotation may lose lines",
			"reason", reason)
	}
}

// setUnchecked stores the reason for an unfinished check. It does not change a decided mode.
func (l *Logs) setUnchecked(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unchecked = text.Clean(": "+cause.Error(), text.MaxMessage)
}

// setAlarms stores and logs the alarms of the log-driver process.
func (l *Logs) setAlarms(s driver.Status) {
	all := text.Clean(strings.Join(s.Alarms, "; "), text.MaxMessage)
	l.mu.Lock()
	before := l.alarms
	l.alarms = all
	l.mu.Unlock()
	switch {
	case all == before:
	case all == "":
		l.cfg.Log.Info("the log-driver process has recovered")
	default:
		l.cfg.Log.Warn("the log-driver process lacks a resource", "alarms", all)
	}
}

// State returns the active mode, or "" if none is decided or usable. reason explains a mode other
// than the preferred one, or lists the alarms of the log-driver process.
func (l *Logs) State() (active, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()

	if !l.isDecided {
		return "", "waiting for the engine to reach the log-driver process" + l.unchecked
	}
	if l.active == ModeCRI && l.reason == "" {
		return l.active, l.alarms
	}

	return l.active, l.reason
}

// Decided returns a channel closed as soon as the active mode is decided.
func (l *Logs) Decided() <-chan struct{} { return l.decided }

// Config returns the log driver and its options for a container. path is the log path beneath the
// pod's log directory; both are "" without a log. At the start it waits until the mode is decided.
// It returns Unavailable if the mode requires CRI files and they are unavailable.
func (l *Logs) Config(ctx context.Context, directory, path string) (model.LogConfig, error) {
	select {
	case <-l.decided:
	case <-ctx.Done():
		_, reason := l.State()
		return model.LogConfig{}, fmt.Errorf("container log: %s: %w", reason, ctx.Err())
	}

	active, reason := l.State()
	switch {
	case active == "":
		return model.LogConfig{}, fmt.Errorf("container log (--container-log=%s): %s: %w",
			l.cfg.Mode, reason, errdefs.ErrUnavailable)
	case active == ModeJSONFile:
		// No options: the engine's defaults apply. Operators set them in daemon.json (max-size,
		// max-file).
		return model.LogConfig{Driver: "json-file"}, nil

	case directory == "" || path == "":
		// The kubelet does not rotate a log without a path. Docker limits the size of this one.
		return model.LogConfig{Driver: "local"}, nil
	}

	return newDriverConfig(directory, path), nil
}

func newDriverConfig(directory, path string) model.LogConfig {
	return model.LogConfig{Driver: driver.Name, Options: map[string]string{
		driver.OptionDirectory: filepath.Clean(directory),
		driver.OptionPath:      filepath.Clean(path),
		// docker logs reads from the driver; Docker's cache would double the work.
		"cache-disabled": "true",
	}}
}

// Started publishes the log of a container at its path after the container has started or failed to
// start.
func (l *Logs) Started(ctx context.Context, c *model.Container) error {
	if c.LogDriver == driver.Name {
		return nil
	}
	return l.links.started(ctx, c)
}

// Removed removes a container's link. Log files remain for their readers until the kubelet removes
// them with the pod.
func (l *Logs) Removed(ctx context.Context, c *model.Container) error { return l.links.removed(ctx, c) }

// Reopen opens a new log at a running container's path after the kubelet has renamed the old one
// (CRI ReopenContainerLog). It returns Unavailable if the log-driver process does not respond, and
// FailedPrecondition if the container's log driver writes no file.
func (l *Logs) Reopen(ctx context.Context, c *model.Container) error {
	if c.LogPath == "" {
		return fmt.Errorf("reopen log of container %s: it has no log path: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	if c.LogDriver != driver.Name {
		return l.links.reopen(ctx, c)
	}

	err := l.cfg.Process.Reopen(ctx, string(c.ID))
	if errdefs.IsNotFound(err) { // it runs, so its log stream starts in a moment
		return errors.Join(fmt.Errorf("reopen log of container %s: %w", c.ID, errdefs.ErrUnavailable), err)
	}

	return err
}
