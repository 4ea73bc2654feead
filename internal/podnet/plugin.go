package podnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/text"
)

const (
	pluginTimeout = time.Minute // for one command of one plugin
	drainTimeout  = time.Second // for output of a killed plugin's descendants
	// Most plugins wait for the single lock of iptables. More concurrency makes each one slower.
	maxConcurrentPlugins = 16
	busyInterval         = 100 * time.Millisecond
	maxBusyAttempts      = 20  // while a plugin's file is being written (ETXTBSY)
	maxExcerpt           = 300 // bytes of a plugin's output in an error

	maxStdout = 1 << 20  // bytes; results of real plugins are below 10 KiB
	maxStderr = 64 << 10 // bytes; further output is dropped
)

// plugins runs CNI plugins (CNI specification, section 3), each with a timeout. Its errors contain
// the plugin's exit code and output.
type plugins struct {
	version.PluginDecoder
	observer *Observer
	log      *slog.Logger
	timeout  time.Duration
	slots    chan struct{} // each running plugin takes one
	held     *os.File      // kept open by every plugin and its descendants; nil for none
}

var _ invoke.Exec = (*plugins)(nil)

// ExecPlugin implements invoke.Exec. It runs one command of a plugin in its own process group, and
// kills the whole group on timeout or when ctx ends. Waiting for a slot does not count towards the
// timeout.
func (p *plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}

	ctx, end := p.observer.begin(ctx, path, environ)
	out, err := p.runWithTimeout(ctx, path, stdin, environ)
	end(err)

	return out, err
}

// runWithTimeout runs one command of a plugin. It kills the plugin on timeout, or if an ADD prints
// more than maxStdout.
func (p *plugins) runWithTimeout(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	timed, cancel := context.WithTimeoutCause(ctx, p.timeout, fmt.Errorf("killed after a timeout of %v",
		p.timeout))
	defer cancel()

	var out, stderr *limited
	var err error
	for range maxBusyAttempts {
		out, stderr, err = p.run(timed, path, stdin, environ)
		if !errors.Is(err, syscall.ETXTBSY) {
			break
		}

		select {
		case <-timed.Done():
		case <-time.After(busyInterval):
		}
	}

	isAdd := parameter(environ, "CNI_COMMAND") == "ADD"
	switch {
	case isAdd && out.cut:
		return nil, fmt.Errorf("killed after printing more than %d bytes; the output starts with: %s", maxStdout,
			excerpt(out.b))
	case timed.Err() != nil && err != nil:
		return nil, context.Cause(timed)
	case err != nil:
		return nil, pluginError(err, out.b, stderr.b)
	}

	if len(stderr.b) > 0 {
		p.log.Debug("a CNI plugin wrote to standard error", "plugin", path, "stderr", excerpt(stderr.b))
	}
	if !isAdd {
		return nil, nil // only an ADD has a result (CNI specification, section 2)
	}

	return checkedResult(out.b)
}

// run runs a plugin and returns the beginning of its standard output and standard error.
func (p *plugins) run(
	ctx context.Context, path string, stdin []byte, environ []string,
) (out, stderr *limited, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	out, stderr = &limited{limit: maxStdout}, &limited{limit: maxStderr}
	if parameter(environ, "CNI_COMMAND") == "ADD" {
		out.full = cancel
	}

	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environ
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = drainTimeout
	if p.held != nil {
		cmd.ExtraFiles = []*os.File{p.held}
	}

	drain, err := capture(cmd, out)
	if err != nil {
		return out, stderr, err
	}

	err = cmd.Run()
	drain()
	// The plugin succeeded, but its background process still holds its output open.
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}

	return out, stderr, err
}

// capture copies the standard output of a command to out. The caller calls drain after the command
// has exited. drain returns after copying the command's own output. It waits at most drainTimeout
// for background processes of the command.
func capture(cmd *exec.Cmd, out *limited) (drain func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}

	cmd.Stdout = w
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(out, r)
	}()

	return func() {
		defer r.Close()

		w.Close()
		select {
		case <-copied:
			return
		case <-time.After(drainTimeout):
		}

		// A process holds the pipe open, or the copying goroutine was starved. Read the rest of the
		// pipe.
		_ = r.SetReadDeadline(time.Unix(1, 0))
		<-copied
		readPending(r, out)
	}, nil
}

// readPending copies the current content of a pipe.
func readPending(r *os.File, out *limited) {
	conn, err := r.SyscallConn()
	if err != nil {
		return
	}

	buf := make([]byte, 64<<10)
	_ = conn.Control(func(fd uintptr) {
		for read := 0; read <= maxStdout; {
			n, err := unix.Read(int(fd), buf) // does not block: the runtime's pipes are non-blocking
			if n <= 0 || err != nil {
				return
			}
			_, _ = out.Write(buf[:n])
			read += n
		}
	})
}

// limited keeps the first limit bytes written to it and drops further ones.
type limited struct {
	limit int
	full  func() // called when the first byte is dropped; nil for nothing

	b   []byte
	cut bool
}

// Write implements io.Writer. It never fails, so the writing process is not disturbed.
func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.limit-len(l.b))
	l.b = append(l.b, p[:n]...)
	if n < len(p) && !l.cut {
		l.cut = true
		if l.full != nil {
			l.full()
		}
	}

	return len(p), nil
}

// pluginError returns the error reported by a failed plugin (CNI specification, section 5,
// "Error"), or an error with its output.
func pluginError(err error, out, stderr []byte) error {
	var e types.Error
	switch {
	case json.Unmarshal(out, &e) == nil && (e.Code != 0 || e.Msg != ""):
		e.Msg, e.Details = excerpt([]byte(e.Msg)), excerpt([]byte(e.Details))
		return fmt.Errorf("CNI error %d: %w", e.Code, &e)
	case len(stderr) > 0:
		return fmt.Errorf("%w; standard error: %s", err, excerpt(stderr))
	case len(out) > 0:
		return fmt.Errorf("%w; output is not a CNI error: %s", err, excerpt(out))
	}

	return fmt.Errorf("%w; no output", err)
}

// excerpt returns the beginning of a text on one line, for errors.
func excerpt(b []byte) string {
	b = b[:min(len(b), 4*maxExcerpt)] // most of it may be white space
	return text.Clean(strings.Join(strings.Fields(string(b)), " "), maxExcerpt)
}

// FindInPath implements invoke.Exec.
func (*plugins) FindInPath(name string, dirs []string) (string, error) {
	if path, err := invoke.FindInPath(name, dirs); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("CNI plugin %q is not in %s: install it (the standard plugins are in the package "+
		"containernetworking-plugins) or correct --cni-bin-dir",
		text.Clean(name, maxExcerpt), strings.Join(dirs, ", "))
}
