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

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

// execTimeouts bound an exec; tests shorten them.
type execTimeouts struct {
	// setup is for each of the engine's steps until the command runs.
	setup time.Duration
	// size is for a client to send the size of its terminal, which it does at once.
	size time.Duration
	// poll is how often the command is checked for its end while a writer blocks.
	poll time.Duration
	// drop is how long a writer may block at the end of a command without loss. The engine's own
	// limit is 2 s.
	drop time.Duration
	// reply is how long a call waits for the end of the command that it gave up.
	reply time.Duration
	// reap is for finding and ending a command that the engine starts after its call was given up.
	reap time.Duration
}

var defaultExecTimeouts = execTimeouts{
	setup: 2 * time.Minute, // the kubelet's own for calls to its runtime
	size:  200 * time.Millisecond,
	poll:  300 * time.Millisecond,
	drop:  1500 * time.Millisecond,
	reply: 2 * time.Second,
	reap:  changeTimeout, // the longest that a request to the engine may take
}

// execution is one exec of a container.
type execution struct {
	*Engine
	container model.ContainerID
	id        string
	Exec
}

// Exec runs a command in a container until it ends and its output is read to the end, and returns
// its exit code. For a command that does not exist it is 127, for one that cannot be executed 126,
// with the engine's text on stderr. Another failure to start it, for instance a missing working
// directory, is InvalidArgument with the engine's text. If the container does not run, or ends
// before the command is started, the error is NotFound or FailedPrecondition. Output that the
// engine may have dropped is an error.
//
// When ctx ends first, the process and all that it started are killed and ctx's cause is returned:
// closing the connection does not end an exec'd process. That holds also if the engine starts it
// later. See ErrClientGone for the exception. An engine that does not start the command within 2
// minutes is Unavailable.
func (e *Engine) Exec(ctx context.Context, id model.ContainerID, x Exec) (int, error) {
	r := &execution{Engine: e, container: id, Exec: x}
	if err := r.create(ctx); err != nil {
		return 0, wrap(r.explain(ctx, err), "exec in container %s", id)
	}

	code, err := r.run(ctx)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", id, r.explain(ctx, err))
	}

	return code, nil
}

// create prepares the exec.
func (r *execution) create(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.execs.setup, errSilent)
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

	created, err := r.docker().ExecCreate(ctx, string(r.container), opts)
	if err != nil {
		return timedOut(ctx, err)
	}

	r.id = created.ID

	return nil
}

// timedOut makes errSilent Unavailable, and lets the cause of another end of ctx show.
func timedOut(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case cause == nil:
		return err
	case errors.Is(cause, errSilent):
		return fmt.Errorf("%w: %w", cause, errdefs.ErrUnavailable)
	default:
		return cause
	}
}

// run starts the command and waits for its end. A command that is given up is ended.
func (r *execution) run(ctx context.Context) (int, error) {
	conn, err := r.start(ctx)
	switch {
	case err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)): // it may be started all the same
		return 0, r.giveUp(ctx, err)
	case err != nil:
		return 0, err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	stop := r.watchStart(ctx, cancel)
	defer stop()

	if r.Stdout == nil {
		r.Stdout = io.Discard
	}

	out := &execOutput{out: r.Stdout}
	if !r.TTY { // a terminal has one stream, in which the engine's text is in its place
		out.isStarted = func() bool { return r.isExecStarted(ctx, r.id) }
	}

	r.Stdout = out
	errOut := &head{to: io.Discard}
	if r.Stderr != nil {
		errOut.to = r.Stderr
	}

	r.Stderr = errOut
	pace := newPace(ctx, r)
	if err := transfer(ctx, conn, pace.streams(), r.resize); err != nil {
		return 0, r.giveUp(ctx, err)
	}

	if pace.isLossy() {
		return 0, errIncomplete
	}

	state, err := r.wait(ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, r.giveUp(ctx, err)
	case err != nil:
		return 0, wrap(err, "wait for the end")
	case state.isFailed:
		return startFailure(r.Exec, out)
	case isRefused(r.Cmd[0], state.exitCode, out.text, errOut.text, r.TTY):
		return exitCannotExecute, nil
	}

	return state.exitCode, nil
}

// start starts the command and returns its connection. The size of the terminal goes with it, so
// that the command knows it from the beginning. Older engines get it as soon as the command has
// started.
func (r *execution) start(ctx context.Context) (client.HijackedResponse, error) {
	opts := client.ExecAttachOptions{TTY: r.TTY}
	if size, ok := r.firstSize(ctx); ok {
		opts.ConsoleSize = client.ConsoleSize{Height: uint(size.Height), Width: uint(size.Width)}
	}

	ctx, cancel := context.WithTimeoutCause(ctx, r.execs.setup, errSilent)
	defer cancel()

	conn, err := r.streams().ExecAttach(ctx, r.id, opts)
	switch {
	case isCut(err):
		return client.HijackedResponse{}, timedOut(ctx, fmt.Errorf("start: %w: %w", errdefs.ErrUnavailable, err))
	case err != nil:
		return client.HijackedResponse{}, timedOut(ctx, wrap(err, "start"))
	}

	return conn.HijackedResponse, nil
}

// isCut reports a connection that ended after the request was sent.
func isCut(err error) bool {
	for _, cut := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, cut) {
			return true
		}
	}
	return false
}

// firstSize waits a moment for the size of the terminal, if the engine takes it with the start.
func (r *execution) firstSize(ctx context.Context) (Size, bool) {
	const sizeAPI = "1.42"
	if !r.TTY || r.Resize == nil || !(spec.Host{APIVersion: r.docker().ClientVersion()}).AtLeast(sizeAPI) {
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

// watchStart gives the exec up if the engine does not start the command in time: it answers the
// request before that.
func (r *execution) watchStart(ctx context.Context, giveUp context.CancelCauseFunc) (stop func() bool) {
	return time.AfterFunc(r.execs.setup, func() {
		if state, err := r.execState(ctx, r.id); err == nil && state.isStarting {
			giveUp(fmt.Errorf("start: %w: %w", errSilent, errdefs.ErrUnavailable))
		}
	}).Stop
}

// wait waits until the engine has noticed the end of the command, which may be a little after the
// end of its output.
func (r *execution) wait(ctx context.Context) (execState, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		state, err := r.execState(ctx, r.id)
		if err != nil || state.ended {
			return state, err
		}

		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}

// startFailure returns the exit code of a command that the engine could not start, and puts the
// engine's text on stderr. A failure that is not the command's is InvalidArgument.
func startFailure(x Exec, out *execOutput) (int, error) {
	said := strings.TrimSpace(string(out.text))
	code, ok := startExitCode(x.Cmd[0], said)
	if !ok {
		return 0, fmt.Errorf("%s: %w", text.Clean(said, text.MaxMessage), errdefs.ErrInvalidArgument)
	}
	if !out.held || x.Stderr == nil {
		return code, nil
	}
	if _, err := io.WriteString(x.Stderr, said+"\n"); err != nil {
		return 0, fmt.Errorf("write stderr: %w", err)
	}

	return code, nil
}

// Attach connects streams to a running container's main process until its output ends or ctx does;
// the process goes on.
func (e *Engine) Attach(ctx context.Context, id model.ContainerID, s Streams) error {
	conn, err := e.attach(ctx, id, s)
	if err != nil {
		return wrap(err, "attach to container %s", id)
	}

	resize := func(ctx context.Context, size Size) error {
		_, err := e.docker().ContainerResize(ctx, string(id),
			client.ContainerResizeOptions{Height: uint(size.Height), Width: uint(size.Width)})
		return err
	}
	if err := transfer(ctx, conn, s, resize); err != nil {
		return fmt.Errorf("attach to container %s: %w", id, err)
	}

	return nil
}

// attach opens the connection.
func (e *Engine) attach(ctx context.Context, id model.ContainerID, s Streams) (client.HijackedResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.execs.setup, errSilent)
	defer cancel()

	conn, err := e.streams().ContainerAttach(ctx, string(id), client.ContainerAttachOptions{
		Stream:     true,
		Stdin:      s.Stdin != nil,
		Stdout:     s.Stdout != nil,
		Stderr:     s.Stderr != nil,
		DetachKeys: attachDetachKeys(),
	})
	if err != nil {
		return client.HijackedResponse{}, timedOut(ctx, err)
	}

	return conn.HijackedResponse, nil
}
