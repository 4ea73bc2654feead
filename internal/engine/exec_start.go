package engine

import (
	"bytes"
	"context"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
)

// Exit codes of a command that could not be started (POSIX, Shell Command Language, 2.8.2).
const (
	exitCannotExecute = 126
	exitNotFound      = 127
)

// maxStartText bounds the engine's error message for a failed start in bytes.
const maxStartText = 16 << 10

// execOutput is the standard output of an exec. If a command fails to start, the engine writes its
// error message to the output, before any other output and with "\r\n" at the end. execOutput holds
// back such a message until it is known whether the command was started.
type execOutput struct {
	out       io.Writer
	isStarted func() bool // waits until the result is known
	text      []byte      // the beginning of the output, at most maxStartText bytes
	started   bool        // output has arrived
	held      bool        // text was held back
}

// Write implements io.Writer.
func (o *execOutput) Write(p []byte) (int, error) {
	first := !o.started
	o.started = true
	if space := maxStartText - len(o.text); first || o.isStarted == nil {
		o.text = append(o.text, p[:min(space, len(p))]...)
	}

	if first && o.isStarted != nil && len(p) <= maxStartText && bytes.HasSuffix(p, []byte("\r\n")) && !o.isStarted() {
		o.held = true
		return len(p), nil
	}

	return o.out.Write(p)
}

// execState is the state of an exec in the engine.
type execState struct {
	pid        int // 0 before the start
	exited     bool
	isFailed   bool // the start failed: the command is not running and has no PID
	isStarting bool // the start is in progress
	exitCode   int
}

// execState inspects an exec.
func (e *Engine) execState(ctx context.Context, exec string) (execState, error) {
	in, err := e.docker().ExecInspect(ctx, exec, client.ExecInspectOptions{})
	if err != nil {
		return execState{}, err
	}

	return execState{
		pid:        in.PID,
		exited:     !in.Running,
		isFailed:   !in.Running && in.PID == 0 && in.ExitCode != 0,
		isStarting: in.Running && in.PID == 0,
		exitCode:   in.ExitCode,
	}, nil
}

// isExecStarted reports whether the command of an exec with output was started. It waits for the
// engine, because a process may print before the engine has recorded its PID.
func (e *Engine) isExecStarted(ctx context.Context, exec string) bool {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		in, err := e.docker().ExecInspect(ctx, exec, client.ExecInspectOptions{})
		switch {
		case err != nil, in.PID != 0:
			return true // wait will return the error
		case !in.Running:
			return in.ExitCode == 0
		}

		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return true
		}
	}
}

// crunNotFound is crun's error message for an unknown command.
const crunNotFound = "executable file `%s` not found"

// startExitCode derives the exit code of a command from the OCI runtime's error message: 127 for an
// unknown command, and 126 for a command that cannot be executed. ok is false for messages with
// another subject, such as the working directory or the user. The engine's own exit code does not
// distinguish these cases, and Docker Engine 20.10 returns 126 for all of them.
func startExitCode(cmd, text string) (code int, ok bool) {
	if strings.Contains(text, strings.ReplaceAll(crunNotFound, "%s", cmd)) {
		return exitNotFound, true
	}

	// Error messages of runc refer to the search for the command, or to the file found. runc checks
	// the file (eaccess), and the kernel executes it.
	search := `exec: ` + strconv.Quote(cmd) + `: `
	found := regexp.MustCompile(`(exec|eaccess) (.*/)?` + regexp.QuoteMeta(cmd) + `: `)
	_, reason, ok := strings.Cut(text, search)
	switch {
	case !ok && found.MatchString(text):
		return exitCannotExecute, true
	case !ok:
		return 0, false
	}

	for _, missing := range []string{"executable file not found", "no such file or directory", "not a directory"} {
		if strings.Contains(reason, missing) {
			return exitNotFound, true
		}
	}

	return exitCannotExecute, true
}
