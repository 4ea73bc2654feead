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

// maxStartText bounds in bytes the engine's text on a command that it could not start.
const maxStartText = 16 << 10

// execOutput is the standard output of an exec. The engine reports a command that it could not
// start as if the command had printed it: a message that ends with "\r\n", before all other output.
// Such a message is held back until the engine says whether the command was started.
type execOutput struct {
	out       io.Writer
	isStarted func() bool // waits until it is known
	text      []byte      // the beginning of the output, at most maxStartText bytes
	begun     bool        // something was written
	held      bool        // text was not passed on
}

// Write passes output on, or holds a message of the engine back.
func (o *execOutput) Write(p []byte) (int, error) {
	first := !o.begun
	o.begun = true
	if room := maxStartText - len(o.text); first || o.isStarted == nil {
		o.text = append(o.text, p[:min(room, len(p))]...)
	}

	if first && o.isStarted != nil && len(p) <= maxStartText && bytes.HasSuffix(p, []byte("\r\n")) && !o.isStarted() {
		o.held = true
		return len(p), nil
	}

	return o.out.Write(p)
}

// execState is what the engine knows of an exec.
type execState struct {
	pid        int // 0 before the start
	ended      bool
	isFailed   bool // the command was not started: it has ended, and never had a PID
	isStarting bool // the engine has begun to start it
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
		ended:      !in.Running,
		isFailed:   !in.Running && in.PID == 0 && in.ExitCode != 0,
		isStarting: in.Running && in.PID == 0,
		exitCode:   in.ExitCode,
	}, nil
}

// isExecStarted reports whether an exec that has output was started. It waits until the engine
// knows: a process may print before the engine has noted its PID.
func (e *Engine) isExecStarted(ctx context.Context, exec string) bool {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		in, err := e.docker().ExecInspect(ctx, exec, client.ExecInspectOptions{})
		switch {
		case err != nil, in.PID != 0:
			return true // whoever waits for the end of the exec gets the error
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

// crunNotFound is crun's text on a command that does not exist.
const crunNotFound = "executable file `%s` not found"

// startExitCode returns the exit code of a command that the engine could not start, from the OCI
// runtime's text: 127 if there is none, 126 if it cannot be executed. ok is false if the text
// speaks of something else, such as the working directory or the user. The engine's own code does
// not tell these apart, and Engine 20.10 says 126 for all.
func startExitCode(cmd, text string) (code int, ok bool) {
	if strings.Contains(text, strings.ReplaceAll(crunNotFound, "%s", cmd)) {
		return exitNotFound, true
	}

	// runc's errors: of the search for the command, and of the file that was found, which runc
	// checks (eaccess) and the kernel executes.
	search, found := `exec: `+strconv.Quote(cmd)+`: `, regexp.MustCompile(`(exec|eaccess) (.*/)?`+regexp.QuoteMeta(cmd)+
		`: `)
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
