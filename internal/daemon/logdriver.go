package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/config"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// LogDriverCommand is the subcommand that runs RunLogDriver.
const LogDriverCommand = "log-driver"

// logDriverMemory is what the log-driver process may hold before its garbage is collected eagerly, in bytes. It stands in the path of
// all output of the node and shall be small.
const logDriverMemory = 12 << 20

// logDriverLog is where the log of detached log-driver processes begins anew, in bytes. They write a line or two each.
const logDriverLog = 1 << 20

const (
	// pluginHeaderTimeout is for the engine to send the header of a request.
	pluginHeaderTimeout = 10 * time.Second
	// pluginHeaderBytes is more than the engine's headers have.
	pluginHeaderBytes = 16 << 10
)

// unmapProgram gives back the pages of the program that only its start has touched: two thirds of what the process would hold. They are
// clean copies of the file, so what is needed again comes from the page cache.
func unmapProgram() error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps") // proc_pid_maps(5)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		var from, to uintptr
		if len(f) < 6 || f[5] != strings.TrimSuffix(self, " (deleted)") || strings.Contains(f[1], "w") { // what was written has no other copy
			continue
		}
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}
	return nil
}

// logDriverGC lets its heap grow by so many percent between collections. It allocates next to nothing for a line.
const logDriverGC = 25

// RunLogDriver is the log-driver process: it serves Docker on socket, or on the socket that systemd has passed, until ctx ends. Its table
// lies under the run directory. What waits in its FIFOs then waits for the next process.
func RunLogDriver(ctx context.Context, cfg *config.Config, socket, version string, log *slog.Logger) error {
	defer absorb(syscall.SIGHUP, syscall.SIGPIPE)()
	debug.SetMemoryLimit(logDriverMemory)
	debug.SetGCPercent(logDriverGC)
	dir := filepath.Join(cfg.RunDirectory, "log-driver")
	passed, err := passedPlugin()
	if err != nil {
		return fmt.Errorf("log-driver: %w", err)
	}
	if passed != nil {
		if err := relieve(dir); err != nil {
			return fmt.Errorf("log-driver: %w", err)
		}
	}
	unlock, err := lockDirectory("--run-directory", dir, handOver)
	if err != nil {
		return fmt.Errorf("log-driver: %w", err)
	}
	defer unlock()
	if err := os.WriteFile(filepath.Join(dir, logDriverPID), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return fmt.Errorf("log-driver: %w", err)
	}
	d, err := driver.New(driver.Config{Directory: filepath.Join(dir, "streams"), Version: version, Log: log})
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := passed, error(nil)
	if l == nil {
		l, err = listenPlugin(socket)
	}
	if err != nil {
		return fmt.Errorf("log-driver: %w", err)
	}
	server := &http.Server{
		Handler:           d.Handler(),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: pluginHeaderTimeout,
		MaxHeaderBytes:    pluginHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	log.Info("the log-driver process serves Docker", "at", l.Addr(), "pid", os.Getpid())
	if err := unmapProgram(); err != nil {
		log.Debug("the program stays in memory as a whole", "err", err)
	}
	if err := notify(ready); err != nil {
		log.Warn("systemd was not told that the log-driver is ready", "err", err)
	}
	if err := server.Serve(d.Listener(l)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("log-driver: %w", err)
	}
	return nil
}

// passedPlugin is the socket that systemd has passed, nil if it has passed none.
func passedPlugin() (net.Listener, error) {
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

// logDriverPID is the file with the number of the process that has the lock.
const logDriverPID = "pid"

// relieve ends the process that a daemon has launched while systemd's socket was away, as for a moment when both units are restarted: systemd
// would start its own in vain, again and again. No line is lost, and what is launched later has no socket of systemd's. A process of which only
// the number is left is none of ours, so the lock is tried first.
func relieve(dir string) error {
	if unlock, err := lockDirectory("--run-directory", dir, 0); err == nil {
		unlock()
		return nil
	}
	b, err := safefs.ReadFile(filepath.Join(dir, logDriverPID), 32)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil || pid <= 1 {
		return fmt.Errorf("%q is no process", b)
	}
	return endLogDriver(pid)
}

// endLogDriver ends a log-driver process of root, and no other process that got its number. The unit of the log-driver has fewer capabilities
// than the daemon, whose child the process is, and so may read its status only.
func endLogDriver(pid int) error {
	host := proc.Host().ByStatus()
	p, err := host.Process(pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it has ended
	}
	if err == nil && (len(p.Args) == 0 || p.Args[0] != LogDriverCommand) {
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

// listenPlugin makes the socket. One that a killed process has left is replaced in one step, since the engine may look for it at any moment.
// One that takes connections is systemd's, for nobody else has the lock: it must not be hidden from systemd's process, which may be slow. Only
// root may connect.
func listenPlugin(socket string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		return nil, errors.Join(fmt.Errorf("systemd holds %s and has not started its process yet; see systemctl status cri-docker-log", socket), c.Close())
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

// launchLogDriver starts the log-driver process in a session of its own, so that neither a restart nor an upgrade of the daemon touches
// it. With systemd, cri-docker-log.socket answers and this is never needed. If it ends before us, ended gets its last words.
func launchLogDriver(cfg *config.Config) (ended <-chan error, err error) {
	dir := filepath.Join(cfg.RunDirectory, "log-driver")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if st, err := out.Stat(); err == nil && st.Size() > logDriverLog {
		if err := out.Truncate(0); err != nil {
			return nil, err
		}
	}
	// The program that runs, even if the file has been replaced by another release.
	//nolint:gosec // the arguments are the daemon's own flags
	cmd := exec.Command("/proc/self/exe", LogDriverCommand, // #nosec G204 -- the program is this one, the arguments are its own flags
		"--run-directory="+cfg.RunDirectory, "--log-level="+cfg.LogLevel, "--log-format="+cfg.LogFormat)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, v := range os.Environ() { // systemd's messages are for the daemon
		if name, _, _ := strings.Cut(v, "="); name != "NOTIFY_SOCKET" && name != "WATCHDOG_USEC" && name != "WATCHDOG_PID" && !strings.HasPrefix(name, "LISTEN_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	end := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		end <- fmt.Errorf("%w: %s", err, lastLine(out.Name()))
	}()
	return end, nil
}

// lastLine is the end of a log.
func lastLine(file string) string {
	b, err := safefs.ReadFile(file, 2*logDriverLog)
	if err != nil {
		return err.Error()
	}
	all := strings.TrimSpace(string(b))
	return text.Clean(all[strings.LastIndexByte(all, '\n')+1:], text.MaxMessage)
}
