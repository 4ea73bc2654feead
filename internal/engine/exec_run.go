package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// Exec runs a command in a container until it ends and its output is read to the end, and returns its
// exit code. For a command that does not exist it is 127, for one that cannot be executed 126, with the
// engine's text on stderr. Another failure to start it, for instance a missing working directory, is
// InvalidArgument with the engine's text. When ctx ends first, the process and all that it started are
// killed and ctx's error is returned: closing the connection does not end an exec'd process.
func (e *Engine) Exec(ctx context.Context, id model.ContainerID, x Exec) (int, error) {
	created, err := e.docker().ExecCreate(ctx, string(id), client.ExecCreateOptions{
		Cmd: x.Cmd, TTY: x.TTY, AttachStdin: x.Stdin != nil, AttachStdout: true, AttachStderr: !x.TTY,
	})
	if err != nil {
		return 0, wrap(err, "exec in container %s", id)
	}
	conn, err := e.streams().ExecAttach(ctx, created.ID, client.ExecAttachOptions{TTY: x.TTY})
	if err != nil {
		return 0, wrap(err, "exec in container %s", id)
	}
	if x.Stdout == nil {
		x.Stdout = io.Discard
	}
	out := &execOutput{out: x.Stdout}
	if !x.TTY { // a terminal has one stream, in which the engine's text is in its place
		out.isStarted = func() bool { return e.isExecStarted(ctx, created.ID) }
	}
	x.Stdout = out
	resize := func(ctx context.Context, s Size) error {
		_, err := e.docker().ExecResize(ctx, created.ID, client.ExecResizeOptions{Height: uint(s.Height), Width: uint(s.Width)})
		return err
	}
	if err := transfer(ctx, conn.HijackedResponse, x.Streams, resize); err != nil {
		if ctx.Err() != nil {
			return 0, errors.Join(ctx.Err(), e.killExec(ctx, id, created.ID))
		}
		return 0, fmt.Errorf("exec in container %s: %w", id, err)
	}
	state, err := e.waitExec(ctx, id, created.ID)
	if err != nil || !state.isFailed {
		return state.exitCode, err
	}
	code, err := startFailure(x, out)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", id, err)
	}
	return code, nil
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

// waitExec waits until the engine has noticed the end of an exec'd process, which may be a little
// after the end of its output.
func (e *Engine) waitExec(ctx context.Context, id model.ContainerID, exec string) (execState, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		state, err := e.execState(ctx, exec)
		switch {
		case err != nil && ctx.Err() != nil:
			return state, errors.Join(ctx.Err(), e.killExec(ctx, id, exec))
		case err != nil:
			return state, wrap(err, "exec in container %s", id)
		case state.ended:
			return state, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return state, errors.Join(ctx.Err(), e.killExec(ctx, id, exec))
		}
	}
}

// Attach connects streams to a running container's main process until its output ends or ctx does; the process goes on.
func (e *Engine) Attach(ctx context.Context, id model.ContainerID, s Streams) error {
	conn, err := e.streams().ContainerAttach(ctx, string(id), client.ContainerAttachOptions{
		Stream: true, Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil,
	})
	if err != nil {
		return wrap(err, "attach to container %s", id)
	}
	resize := func(ctx context.Context, size Size) error {
		_, err := e.docker().ContainerResize(ctx, string(id), client.ContainerResizeOptions{Height: uint(size.Height), Width: uint(size.Width)})
		return err
	}
	if err := transfer(ctx, conn.HijackedResponse, s, resize); err != nil {
		return fmt.Errorf("attach to container %s: %w", id, err)
	}
	return nil
}

// transfer copies between a hijacked connection and streams until the output ends or ctx does, and closes the connection. The copy of
// stdin may outlive it, blocked in a read of the caller's, which ends when the caller closes its side.
func transfer(ctx context.Context, conn client.HijackedResponse, s Streams, resize func(context.Context, Size) error) error {
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.Stdin != nil {
		go func() {
			_, _ = io.Copy(conn.Conn, s.Stdin) // its end, however it came, is passed on
			_ = conn.CloseWrite()
		}()
	}
	if s.Resize != nil {
		go follow(ctx, s.Resize, resize)
	}
	ended := make(chan error, 1)
	go func() { ended <- output(conn, s) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		conn.Close() // ends the copy of the output
		<-ended
		return ctx.Err()
	}
}

func output(conn client.HijackedResponse, s Streams) error {
	out, errOut := s.Stdout, s.Stderr
	if out == nil {
		out = io.Discard
	}
	if errOut == nil {
		errOut = io.Discard
	}
	var err error
	if s.TTY {
		_, err = io.Copy(out, conn.Reader)
	} else {
		_, err = stdcopy.StdCopy(out, errOut, conn.Reader)
	}
	return err
}

// follow passes terminal sizes on. The first one may come before the engine has started the process, so each is tried for a while.
func follow(ctx context.Context, sizes <-chan Size, resize func(context.Context, Size) error) {
	for {
		select {
		case <-ctx.Done():
			return
		case s, ok := <-sizes:
			if !ok {
				return
			}
			for try := 0; try < 20 && resize(ctx, s) != nil; try++ {
				select {
				case <-ctx.Done():
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
		}
	}
}
