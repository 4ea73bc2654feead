package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/engine/output"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// execTimeouts are the timeouts of an exec. Tests shorten them.
type execTimeouts struct {
	// setup bounds each request to the engine until the command runs.
	setup time.Duration
	// size bounds the wait for the size of the client's terminal. Clients send it immediately.
	size time.Duration
	// poll is the interval of checks for the exit of the command while a writer blocks.
	poll time.Duration
	// drop is the maximum time for a writer to block at the exit of a command without a loss of
	// output. The engine's own limit is 2 s.
	drop time.Duration
	// reply bounds the wait of a cancelled call for the end of its command.
	reply time.Duration
	// reap bounds the search for a command started by the engine after its call was cancelled.
	reap time.Duration
}

var defaultExecTimeouts = execTimeouts{
	setup: 2 * time.Minute, // the kubelet's timeout for runtime requests
	size:  200 * time.Millisecond,
	poll:  300 * time.Millisecond,
	drop:  1500 * time.Millisecond,
	reply: 2 * time.Second,
	reap:  changeTimeout, // the maximum duration of a request to the engine
}

// execution is one exec of a container.
type execution struct {
	*Engine
	container model.ContainerID
	id        string
	direct    *output.Output // nil if all output comes from the engine
	Exec
}

// Exec runs a command in a container, reads its output to the end, and returns its exit code. The
// exit code is 127 for an unknown command, and 126 for a command that cannot be executed, with the
// engine's message on stderr. Other failures to start it, such as a missing working directory, are
// InvalidArgument with the engine's message. If the container is not running, or exits before the
// start of the command, the error is NotFound or FailedPrecondition. Exec returns an error if the
// engine may have dropped output.
//
// When ctx ends first, Exec kills the process and all its descendants, even if the engine starts it
// later, and returns the cause of ctx. Closing the connection alone would not end the process. See
// ErrClientDisconnected for the exception. The error is Unavailable if the engine does not start
// the command within 2 minutes.
func (e *Engine) Exec(ctx context.Context, id model.ContainerID, x Exec) (int, error) {
	r := &execution{Engine: e, container: id, Exec: x}
	if x.Output != "" && x.Output == e.cfg.OutputDirectory && !x.TTY {
		if direct, err := output.Open(x.Output); err == nil {
			defer direct.Close()
			r.direct = direct
		} else {
			e.cfg.Log.Warn("the output of an exec comes from the engine", "container", id, "err", err)
		}
	}

	if err := r.create(ctx); err != nil {
		return 0, wrap(r.explain(ctx, err), "exec in container %s", id)
	}

	code, err := r.run(ctx)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", id, r.explain(ctx, err))
	}

	return code, nil
}

// create creates the exec.
func (r *execution) create(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.execs.setup, errSetupTimeout)
	defer cancel()

	opts := client.ExecCreateOptions{
		Cmd:          r.Cmd,
		TTY:          r.TTY,
		AttachStdin:  r.Stdin != nil,
		AttachStdout: true,
		AttachStderr: !r.TTY,
	}
	if r.TTY && r.Stdin != nil {
		opts.DetachKeys = execDetachKeys()
	}

	if r.direct != nil {
		opts.Env = []string{r.direct.Variable()}
	}

	created, err := r.docker().ExecCreate(ctx, string(r.container), opts)
	if err != nil {
		return setupError(ctx, err)
	}

	r.id = created.ID

	return nil
}

// setupError returns the cause of ctx, or err if ctx has not ended. errSetupTimeout becomes
// Unavailable.
func setupError(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case cause == nil:
		return err
	case errors.Is(cause, errSetupTimeout):
		return fmt.Errorf("%w: %w", cause, errdefs.ErrUnavailable)
	default:
		return cause
	}
}

// run starts the command and waits for its exit. If it fails, it aborts the command.
func (r *execution) run(ctx context.Context) (int, error) {
	conn, err := r.start(ctx)
	switch {
	case err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)): // the engine may still start it
		return 0, r.abort(ctx, err)
	case err != nil:
		return 0, err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	stop := r.watchStart(ctx, cancel)
	defer stop()

	out, errOut := r.recordOutputs(ctx)
	monitor := newWriteMonitor(ctx, r)

	// A failure of a writer ends the session, but does not cancel the exec (see endFunc).
	session, endSession := context.WithCancelCause(ctx)
	defer endSession(nil)

	streams := r.startDirect(session, monitor.streams(), endSession)
	if err := transfer(session, conn, streams, true, r.resize); err != nil {
		return 0, r.abort(ctx, err)
	}

	state, err := r.wait(ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, r.abort(ctx, err)
	case err != nil:
		return 0, wrap(err, "wait for exit")
	}

	if err := r.finishDirect(session); err != nil {
		return 0, r.abort(ctx, err)
	}
	if monitor.isLossy() {
		return 0, errIncomplete
	}

	switch {
	case state.isFailed:
		return startFailure(r.Exec, out)
	case isRefused(r.Cmd[0], state.exitCode, out.text, errOut.text, r.TTY):
		return exitCannotExecute, nil
	}

	return state.exitCode, nil
}

// recordOutputs replaces the writers of the exec by recording ones.
func (r *execution) recordOutputs(ctx context.Context) (*execOutput, *prefixWriter) {
	if r.Stdout == nil {
		r.Stdout = io.Discard
	}

	out := &execOutput{out: r.Stdout}
	if !r.TTY { // a terminal has only one stream, so the engine's message can stay in it
		out.isStarted = func() bool { return r.isExecStarted(ctx, r.id) }
	}

	errOut := &prefixWriter{to: io.Discard}
	if r.Stderr != nil {
		errOut.to = r.Stderr
	}

	r.Stdout, r.Stderr = out, errOut

	return out, errOut
}

// start starts the command and returns its connection. The request includes the size of the
// terminal, so that the command has it from the beginning. Older engines receive the size after the
// start.
func (r *execution) start(ctx context.Context) (client.HijackedResponse, error) {
	opts := client.ExecAttachOptions{TTY: r.TTY}
	if size, ok := r.firstSize(ctx); ok {
		opts.ConsoleSize = client.ConsoleSize{Height: uint(size.Height), Width: uint(size.Width)}
	}

	ctx, cancel := context.WithTimeoutCause(ctx, r.execs.setup, errSetupTimeout)
	defer cancel()

	conn, err := r.streams().ExecAttach(ctx, r.id, opts)
	switch {
	case isConnectionLost(err):
		return client.HijackedResponse{}, setupError(ctx, fmt.Errorf("start: %w: %w", errdefs.ErrUnavailable, err))
	case err != nil:
		return client.HijackedResponse{}, setupError(ctx, wrap(err, "start"))
	}

	return conn.HijackedResponse, nil
}

// isConnectionLost reports whether the connection ended after the request was sent.
func isConnectionLost(err error) bool {
	for _, lost := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, lost) {
			return true
		}
	}
	return false
}

// firstSize waits briefly for the size of the terminal, if the engine supports it at the start.
func (r *execution) firstSize(ctx context.Context) (Size, bool) {
	const sizeAPI = "1.42"
	if !r.TTY || r.Resize == nil || !(model.Host{APIVersion: r.docker().ClientVersion()}).AtLeast(sizeAPI) {
		return Size{}, false
	}

	late := time.NewTimer(r.execs.size)
	defer late.Stop()

	select {
	case size, ok := <-r.Resize:
		return size, ok && size.Width > 0 && size.Height > 0
	case <-late.C:
	case <-ctx.Done():
	}

	return Size{}, false
}

// resize sets the size of the terminal.
func (r *execution) resize(ctx context.Context, s Size) error {
	_, err := r.docker().ExecResize(ctx, r.id, client.ExecResizeOptions{Height: uint(s.Height), Width: uint(s.Width)})
	return err
}

// watchStart cancels the exec if the engine does not start the command in time. The engine responds
// to the request before it starts the command.
func (r *execution) watchStart(ctx context.Context, cancel context.CancelCauseFunc) (stop func() bool) {
	return time.AfterFunc(r.execs.setup, func() {
		if state, err := r.execState(ctx, r.id); err == nil && state.isStarting {
			cancel(fmt.Errorf("start: %w: %w", errSetupTimeout, errdefs.ErrUnavailable))
		}
	}).Stop
}

// wait waits until the engine has recorded the exit of the command, shortly after the end of its
// output.
func (r *execution) wait(ctx context.Context) (execState, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		state, err := r.execState(ctx, r.id)
		if err != nil || state.exited {
			return state, err
		}

		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}

// startFailure returns the exit code of a command that failed to start, and writes the engine's
// message to stderr. A failure with another cause than the command is InvalidArgument.
func startFailure(x Exec, out *execOutput) (int, error) {
	message := strings.TrimSpace(string(out.text))
	code, ok := startExitCode(x.Cmd[0], message)
	if !ok {
		return 0, fmt.Errorf("%s: %w", text.Clean(message, text.MaxMessage), errdefs.ErrInvalidArgument)
	}

	if !out.held || x.Stderr == nil {
		return code, nil
	}
	if _, err := io.WriteString(x.Stderr, message+"\n"); err != nil {
		return 0, fmt.Errorf("write stderr: %w", err)
	}

	return code, nil
}

// Attach connects streams to the main process of a running container until the end of its output or
// of ctx. The process continues. stdinOnce is that of the container: the end of the input then ends
// the process's stdin. Otherwise, and with a terminal, it has no effect, since the engine would end
// the output as well.
func (e *Engine) Attach(ctx context.Context, id model.ContainerID, stdinOnce bool, s Streams) error {
	conn, err := e.attach(ctx, id, s)
	if err != nil {
		return wrap(err, "attach to container %s", id)
	}

	resize := func(ctx context.Context, size Size) error {
		_, err := e.docker().ContainerResize(ctx, string(id),
			client.ContainerResizeOptions{Height: uint(size.Height), Width: uint(size.Width)})
		return err
	}
	if err := transfer(ctx, conn, s, stdinOnce && !s.TTY, resize); err != nil {
		return fmt.Errorf("attach to container %s: %w", id, err)
	}

	return nil
}

// attach opens the connection.
func (e *Engine) attach(ctx context.Context, id model.ContainerID, s Streams) (client.HijackedResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.execs.setup, errSetupTimeout)
	defer cancel()

	conn, err := e.streams().ContainerAttach(ctx, string(id), client.ContainerAttachOptions{
		Stream:     true,
		Stdin:      s.Stdin != nil,
		Stdout:     s.Stdout != nil,
		Stderr:     s.Stderr != nil,
		DetachKeys: attachDetachKeys(),
	})
	if err != nil {
		return client.HijackedResponse{}, setupError(ctx, err)
	}

	return conn.HijackedResponse, nil
}
