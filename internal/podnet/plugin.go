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
	pluginDeadline = time.Minute // for one command of one plugin
	drainDeadline  = time.Second // for what a killed plugin's descendants still hold open
	// most of them wait for one lock of iptables, and the more there are, the longer each one takes
	pluginsAtOnce = 16
	busyPause     = 100 * time.Millisecond
	busyTries     = 20  // a plugin's file that is being written
	outputShown   = 300 // bytes of a plugin's output in an error

	maxStdout = 1 << 20  // bytes; results of real plugins are below 10 KiB
	maxStderr = 64 << 10 // bytes; the rest is dropped
)

// plugins runs CNI plugins (CNI specification, section 3) with a time limit each, and says of one
// that fails which it is, what it said, and with which code.
type plugins struct {
	version.PluginDecoder
	observer *Observer
	log      *slog.Logger
	limit    time.Duration
	slots    chan struct{} // one is taken by each plugin that runs
	held     *os.File      // kept open by every plugin and its descendants; nil for none
}

var _ invoke.Exec = (*plugins)(nil)

// ExecPlugin implements invoke.Exec: it runs one command of a plugin in a process group of its own,
// which is killed with all that it started when the time is over or ctx ends. The time does not run
// while it waits for its turn.
func (p *plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}

	ctx, end := p.observer.begin(ctx, path, environ)
	out, err := p.inTime(ctx, path, stdin, environ)
	end(err)

	return out, err
}

// inTime runs one command of a plugin, which is killed when its time is over or an ADD prints more
// than a result can be.
func (p *plugins) inTime(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	timed, cancel := context.WithTimeoutCause(ctx, p.limit, fmt.Errorf("it did not end within %v and was killed",
		p.limit))
	defer cancel()

	var out, said *limited
	var err error
	for range busyTries {
		out, said, err = p.run(timed, path, stdin, environ)
		if !errors.Is(err, syscall.ETXTBSY) {
			break
		}

		select {
		case <-timed.Done():
		case <-time.After(busyPause):
		}
	}

	isAdd := parameter(environ, "CNI_COMMAND") == "ADD"
	switch {
	case isAdd && out.cut:
		return nil, fmt.Errorf("it printed more than %d bytes and was killed; the output began: %s", maxStdout,
			shown(out.b))
	case timed.Err() != nil && err != nil:
		return nil, context.Cause(timed)
	case err != nil:
		return nil, pluginError(err, out.b, said.b)
	}

	if len(said.b) > 0 {
		p.log.Debug("a CNI plugin wrote to standard error", "plugin", path, "stderr", shown(said.b))
	}
	if !isAdd {
		return nil, nil // only an ADD has a result (CNI specification, section 2)
	}

	return checkedResult(out.b)
}

// run runs a plugin and returns the beginnings of what it wrote to standard output and standard
// error.
func (p *plugins) run(
	ctx context.Context, path string, stdin []byte, environ []string,
) (out, said *limited, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	out, said = &limited{limit: maxStdout}, &limited{limit: maxStderr}
	if parameter(environ, "CNI_COMMAND") == "ADD" {
		out.full = cancel
	}

	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environ
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stderr = said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = drainDeadline
	if p.held != nil {
		cmd.ExtraFiles = []*os.File{p.held}
	}

	drain, err := capture(cmd, out)
	if err != nil {
		return out, said, err
	}

	err = cmd.Run()
	drain()
	// it succeeded and left a process that holds its output open
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}

	return out, said, err
}

// capture has the standard output of a command written to out. drain is to be called when the
// command has ended: it returns when all is there that the command itself wrote, and does not wait
// for processes that it left behind for longer than drainDeadline.
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
		case <-time.After(drainDeadline):
		}

		// Something holds the pipe open, or the copy had no processor. What is in the pipe is still
		// read.
		_ = r.SetReadDeadline(time.Unix(1, 0))
		<-copied
		readPending(r, out)
	}, nil
}

// readPending copies what a pipe holds now.
func readPending(r *os.File, out *limited) {
	conn, err := r.SyscallConn()
	if err != nil {
		return
	}

	buf := make([]byte, 64<<10)
	_ = conn.Control(func(fd uintptr) {
		for read := 0; read <= maxStdout; {
			n, err := unix.Read(int(fd), buf) // it does not block: the runtime's pipes never do
			if n <= 0 || err != nil {
				return
			}
			_, _ = out.Write(buf[:n])
			read += n
		}
	})
}

// limited keeps the first bytes that are written to it and drops the rest.
type limited struct {
	limit int
	full  func() // called when the first byte is dropped; nil for nothing

	b   []byte
	cut bool
}

// Write implements io.Writer. It never fails, so that the process that writes is not disturbed.
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

// pluginError is the error that a failed plugin reports (CNI specification, section 5, "Error"), or
// as much as can be seen of it.
func pluginError(err error, out, said []byte) error {
	var e types.Error
	switch {
	case json.Unmarshal(out, &e) == nil && (e.Code != 0 || e.Msg != ""):
		e.Msg, e.Details = shown([]byte(e.Msg)), shown([]byte(e.Details))
		return fmt.Errorf("CNI error %d: %w", e.Code, &e)
	case len(said) > 0:
		return fmt.Errorf("%w; on standard error: %s", err, shown(said))
	case len(out) > 0:
		return fmt.Errorf("%w; its output is no CNI error: %s", err, shown(out))
	}

	return fmt.Errorf("%w; it said nothing", err)
}

// shown is the beginning of a text on one line, fit for an error.
func shown(b []byte) string {
	b = b[:min(len(b), 4*outputShown)] // of which white space may be the most
	return text.Clean(strings.Join(strings.Fields(string(b)), " "), outputShown)
}

// FindInPath implements invoke.Exec.
func (*plugins) FindInPath(name string, dirs []string) (string, error) {
	if path, err := invoke.FindInPath(name, dirs); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("CNI plugin %q is not in %s: install it (the standard plugins are in the package "+
		"containernetworking-plugins) or correct --cni-bin-dir",
		text.Clean(name, outputShown), strings.Join(dirs, ", "))
}
