// Package process runs the log-driver process: its program, its socket for Docker, and its launch
// by the daemon without systemd.
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

// Command is the subcommand for Run.
const Command = "log-driver"

const (
	// memoryLimit is the heap size, in bytes, above which garbage is collected eagerly. All output
	// of the node passes through the process, so it must stay small.
	memoryLimit = 12 << 20
	// gcPercent is the heap growth between collections. A line allocates almost nothing.
	gcPercent = 25
)

const (
	// headerTimeout limits the wait for a request header from the engine.
	headerTimeout = 10 * time.Second
	// maxHeaderBytes exceeds the size of the engine's headers.
	maxHeaderBytes = 16 << 10
)

// Config configures the process. All fields are required.
type Config struct {
	// RunDirectory is the daemon's run directory. The log-driver's table is below it.
	RunDirectory string
	// Socket is the socket for Docker, unless systemd has passed one.
	Socket string
	// Version is this program's.
	Version string
	Log     *slog.Logger
}

// directory returns the log-driver's subdirectory of the run directory.
func directory(runDirectory string) string { return filepath.Join(runDirectory, "log-driver") }

// Run serves Docker until ctx ends. Output still in the FIFOs then waits for the next process.
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
		if err := stopLaunched(dir); err != nil {
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

	log.Info("serving Docker", "address", l.Addr(), "pid", os.Getpid())
	if err := process.DropProgramPages(); err != nil {
		log.Debug("cannot release the program's pages", "err", err)
	}

	if err := process.Notify(process.Ready); err != nil {
		log.Warn("cannot notify systemd that the log driver is ready", "err", err)
	}

	if err := server.Serve(d.Listener(l)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}

	return nil
}

// passedListener returns the socket passed by systemd, or nil without one.
func passedListener() (net.Listener, error) {
	passed, err := activation.Listeners()
	switch {
	case err != nil:
		return nil, fmt.Errorf("systemd's socket: %w", err)
	case len(passed) > 1:
		return nil, fmt.Errorf("systemd passed %d sockets, expected one", len(passed))
	case len(passed) == 1:
		return passed[0], nil
	}

	return nil, nil
}

// pidFile contains the PID of the process holding the lock.
const pidFile = "pid"

// stopLaunched stops a process launched by the daemon while systemd's socket was missing, for
// example while both units restart. Otherwise systemd would start its own process in vain, again
// and again. No line is lost, and later launches have no socket from systemd. The PID in the file
// may have been reused, so stopLaunched tries the lock first.
func stopLaunched(dir string) error {
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
		return fmt.Errorf("%q is not a PID", b)
	}

	return stop(pid)
}

// stop stops a log-driver process of root, and never another process with a reused PID. The
// log-driver's unit has fewer capabilities than the daemon, the parent of that process, so it can
// only read the process's status.
func stop(pid int) error {
	host := proc.Host().ByStatus()
	p, err := host.Process(pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it has ended
	}

	if err == nil && (len(p.Args) == 0 || p.Args[0] != Command) {
		err = errors.New("not a log-driver process")
	}

	if err == nil {
		err = host.Signal(p, unix.SIGTERM)
	}

	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop the launched process %d: %w", pid, err)
	}

	return nil
}

// listen creates the socket, for root only. It atomically replaces the socket of a killed process,
// since the engine may connect at any moment. This process holds the lock, so an existing listener
// is systemd's. It must not be replaced, because systemd's process may only be slow to start.
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
