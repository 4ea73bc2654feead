// Package process runs the log-driver process: its program, the socket on which it serves Docker,
// and its launch by the daemon where systemd does not start it.
package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/process"
	"cri-dockerd/internal/safefs"
)

// Command is the subcommand that calls Run.
const Command = "log-driver"

const (
	// memoryLimit is the heap in bytes above which garbage is collected eagerly. The process stands
	// in the path of all output of the node and shall be small.
	memoryLimit = 12 << 20
	// gcPercent is how much the heap grows between collections. A line allocates next to nothing.
	gcPercent = 25
)

const (
	// headerTimeout is for the engine to send the header of a request.
	headerTimeout = 10 * time.Second
	// maxHeaderBytes is more than the engine's headers have.
	maxHeaderBytes = 16 << 10
)

// Config is what the process needs; all is required.
type Config struct {
	// RunDirectory is the daemon's. The table of the log-driver lies under it.
	RunDirectory string
	// Socket is where to serve Docker, unless systemd has passed a socket.
	Socket string
	// Version is this program's.
	Version string
	Log     *slog.Logger
}

// directory is the log-driver's part of the run directory.
func directory(runDirectory string) string { return filepath.Join(runDirectory, "log-driver") }

// Run serves Docker until ctx ends. Output that waits in the FIFOs then waits for the next process.
func Run(ctx context.Context, cfg Config) error {
	if err := run(ctx, cfg); err != nil {
		return fmt.Errorf("log-driver: %w", err)
	}
	return nil
}

func run(ctx context.Context, cfg Config) error {
	defer process.Absorb(syscall.SIGHUP, syscall.SIGPIPE)()

	debug.SetMemoryLimit(memoryLimit)
	debug.SetGCPercent(gcPercent)

	dir := directory(cfg.RunDirectory)
	l, err := passedListener()
	if err != nil {
		return err
	}

	if l != nil {
		defer l.Close()
		if err := endLaunched(dir); err != nil {
			return err
		}
	}

	unlock, err := process.LockDirectory("--run-directory", dir, process.HandOverTimeout)
	if err != nil {
		return err
	}
	defer unlock()

	if err := os.WriteFile(filepath.Join(dir, pidFile), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}

	d, err := driver.New(driver.Config{
		Directory: filepath.Join(dir, "streams"),
		Version:   cfg.Version,
		Log:       cfg.Log,
	})
	if err != nil {
		return err
	}
	defer d.Close()

	if l == nil {
		if l, err = listen(cfg.Socket); err != nil {
			return err
		}
		defer l.Close()
	}

	return serve(ctx, d, l, cfg.Log)
}

// serve serves Docker on l until ctx ends.
func serve(ctx context.Context, d *driver.Driver, l net.Listener, log *slog.Logger) error {
	server := &http.Server{
		Handler:           d.Handler(),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}

	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()

	log.Info("the log-driver process serves Docker", "at", l.Addr(), "pid", os.Getpid())
	if err := process.DropProgramPages(); err != nil {
		log.Debug("the program stays in memory as a whole", "err", err)
	}

	if err := process.Notify(process.Ready); err != nil {
		log.Warn("systemd was not notified that the log-driver is ready", "err", err)
	}

	if err := server.Serve(d.Listener(l)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}

	return nil
}

// passedListener returns the socket that systemd has passed, nil if it has passed none.
func passedListener() (net.Listener, error) {
	passed, err := activation.Listeners()
	switch {
	case err != nil:
		return nil, fmt.Errorf("systemd's socket: %w", err)
	case len(passed) > 1:
		return nil, fmt.Errorf("systemd has passed %d sockets, one is expected", len(passed))
	case len(passed) == 1:
		return passed[0], nil
	}

	return nil, nil
}

// pidFile has the number of the process that holds the lock.
const pidFile = "pid"

// endLaunched ends the process that a daemon has launched while systemd's socket was missing, as
// for a moment when both units are restarted: systemd would start its own in vain, again and again.
// No line is lost, and later launches have no socket of systemd. The number alone may be another
// process's by now, so the lock is tried first.
func endLaunched(dir string) error {
	if unlock, err := process.LockDirectory("--run-directory", dir, 0); err == nil {
		unlock()
		return nil
	}

	b, err := safefs.ReadFile(filepath.Join(dir, pidFile), 32)
	if err != nil {
		return err
	}

	pid, err := strconv.Atoi(string(b))
	if err != nil || pid <= 1 {
		return fmt.Errorf("%q is no process", b)
	}

	return end(pid)
}

// end ends a log-driver process of root, and no other process that got its number. The unit of the
// log-driver has fewer capabilities than the daemon, whose child the process is, and so may read
// its status only.
func end(pid int) error {
	host := proc.Host().ByStatus()
	p, err := host.Process(pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it has ended
	}

	if err == nil && (len(p.Args) == 0 || p.Args[0] != Command) {
		err = errors.New("it is no log-driver process")
	}

	if err == nil {
		err = host.Signal(p, unix.SIGTERM)
	}

	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end the launched process %d: %w", pid, err)
	}

	return nil
}

// listen makes the socket, for root only. It replaces the socket of a killed process in one step,
// since the engine may look for it at any moment. A socket that takes connections is systemd's,
// since this process has the lock: it must not be hidden from systemd's process, which may be slow.
func listen(socket string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		err = fmt.Errorf("systemd holds %s and has not started its process yet; see systemctl status cri-docker-log",
			socket)
		return nil, errors.Join(err, c.Close())
	}

	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, err
	}

	tmp := socket + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}

	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}

	l.SetUnlinkOnClose(false) // the name stays for the next process
	if err = os.Chmod(tmp, 0o600); err == nil {
		err = os.Rename(tmp, socket)
	}

	if err != nil {
		return nil, errors.Join(err, l.Close())
	}

	return l, nil
}
