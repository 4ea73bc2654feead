package stream

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"cri-dockerd/internal/engine"
)

// adapter is what the streaming server calls.
type adapter struct {
	runtime Runtime
	dial    func(ctx context.Context, netns, network, addr string) (net.Conn, error)
}

// noStdin marks the container ID of a request without stdin on its way through the streaming server, which over WebSockets hands out a
// reader in any case. Its immediate end would be passed on, and close the stdin of the process that is only watched.
const noStdin = "no-stdin/"

func mark(containerID string, stdin bool) string {
	if stdin || containerID == "" {
		return containerID
	}
	return noStdin + containerID
}

func unmark(id string, in io.Reader) (string, io.Reader) {
	if id, marked := strings.CutPrefix(id, noStdin); marked {
		return id, nil
	}
	return id, in
}

// Exec implements streaming.Runtime. An exit code other than 0 is an error of the type that the server looks for. A client that goes away
// does not end the process, as on every other runtime.
func (a *adapter) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	id, in = unmark(id, in)
	sizes, done := convert(ctx, resize)
	code, err := a.runtime.Exec(ctx, id, engine.Exec{Cmd: cmd, Streams: streams(tty, in, out, errOut, sizes)})
	cancel()
	<-done
	if err == nil && code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit status %d", code), Code: code}
	}
	return err
}

// Attach implements streaming.Runtime. A client that goes away ends it.
func (a *adapter) Attach(client context.Context, id string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, cancel := context.WithCancel(client)
	id, in = unmark(id, in)
	sizes, done := convert(ctx, resize)
	err := a.runtime.Attach(ctx, id, streams(tty, in, out, errOut, sizes))
	cancel()
	<-done
	if client.Err() != nil {
		return nil // nobody is there to be told
	}
	return err
}

// streams leaves nil what is not there; a terminal has no stderr of its own.
func streams(tty bool, in io.Reader, out, errOut io.WriteCloser, sizes <-chan engine.Size) engine.Streams {
	s := engine.Streams{TTY: tty, Stdin: in, Resize: sizes}
	if out != nil {
		s.Stdout = out
	}
	if errOut != nil && !tty {
		s.Stderr = errOut
	}
	return s
}

// convert passes terminal sizes on until there are no more or ctx ends; then done is closed. Without a source there is no channel.
func convert(ctx context.Context, in <-chan remotecommand.TerminalSize) (out <-chan engine.Size, done <-chan struct{}) {
	end := make(chan struct{})
	if in == nil {
		close(end)
		return nil, end
	}
	sizes := make(chan engine.Size)
	go func() {
		defer close(end)
		for {
			select {
			case <-ctx.Done():
				return
			case s, ok := <-in:
				if !ok {
					return
				}
				select {
				case <-ctx.Done():
					return
				case sizes <- engine.Size{Width: s.Width, Height: s.Height}:
				}
			}
		}
	}()
	return sizes, end
}
