package podnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

const (
	pluginDeadline = time.Minute // for one command of one plugin
	drainDeadline  = time.Second // for what a killed plugin's descendants still hold open
	pluginsAtOnce  = 16          // most of them wait for one lock of iptables, and the more there are, the longer each one takes
	busyPause      = 100 * time.Millisecond
	busyTries      = 20  // a plugin's file that is being written
	outputShown    = 300 // bytes of a plugin's output in an error
)

// plugins runs CNI plugins (CNI specification, section 3) with a time limit each, and says of one that fails which it is, what it said, and
// with which code.
type plugins struct {
	version.PluginDecoder
	observer *Observer
	log      *slog.Logger
	limit    time.Duration
	slots    chan struct{} // one is taken by each plugin that runs
	held     *os.File      // kept open by every plugin and its descendants; nil for none
}

var _ invoke.Exec = (*plugins)(nil)

// ExecPlugin implements invoke.Exec: it runs one command of a plugin in a process group of its own, which is killed with all that it
// started when the time is over or ctx ends. The time does not run while it waits for its turn.
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

// inTime runs one command of a plugin, which is killed when its time is over.
func (p *plugins) inTime(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	timed, cancel := context.WithTimeoutCause(ctx, p.limit, fmt.Errorf("it did not end within %v and was killed", p.limit))
	defer cancel()
	var out, said []byte
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
	switch {
	case timed.Err() != nil && err != nil:
		return nil, context.Cause(timed)
	case err != nil:
		return nil, pluginError(err, out, said)
	}
	if len(said) > 0 {
		p.log.Debug("a CNI plugin says", "plugin", path, "stderr", shown(said))
	}
	if len(bytes.TrimSpace(out)) > 0 && !json.Valid(out) {
		return nil, fmt.Errorf("its output is not JSON: %s", shown(out))
	}
	return out, nil
}

func (p *plugins) run(ctx context.Context, path string, stdin []byte, environ []string) (out, said []byte, err error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = drainDeadline
	if p.held != nil {
		cmd.ExtraFiles = []*os.File{p.held}
	}
	if err = cmd.Run(); errors.Is(err, exec.ErrWaitDelay) { // it has ended well, and said all that it had to
		err = nil
	}
	return stdout.Bytes(), stderr.Bytes(), err
}

// pluginError is what a plugin that failed says (CNI specification, section 5, "Error"), or as much as can be seen of it.
func pluginError(err error, out, said []byte) error {
	var e types.Error
	switch {
	case json.Unmarshal(out, &e) == nil && (e.Code != 0 || e.Msg != ""):
		return fmt.Errorf("CNI error %d: %w", e.Code, &e)
	case len(said) > 0:
		return fmt.Errorf("%w; on standard error: %s", err, shown(said))
	case len(out) > 0:
		return fmt.Errorf("%w; its output is no CNI error: %s", err, shown(out))
	}
	return fmt.Errorf("%w; it said nothing", err)
}

// shown is the beginning of a text on one line.
func shown(b []byte) string {
	s := strings.Join(strings.Fields(string(b)), " ")
	if len(s) > outputShown {
		s = strings.ToValidUTF8(s[:outputShown], "") + "…"
	}
	return s
}

// FindInPath implements invoke.Exec.
func (*plugins) FindInPath(name string, dirs []string) (string, error) {
	if path, err := invoke.FindInPath(name, dirs); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("CNI plugin %q is not in %s: install it (the standard plugins are in the package containernetworking-plugins) or correct --cni-bin-dir",
		name, strings.Join(dirs, ", "))
}
