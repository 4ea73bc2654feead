package engine

import (
	"bytes"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// TestIsRefused distinguishes runc's message about a failed execve from the output of a command.
func TestIsRefused(t *testing.T) {
	const line = "exec /script: exec format error\n"

	for name, c := range map[string]struct {
		cmd            string
		code           int
		stdout, stderr string
		tty            bool
		want           bool
	}{
		"bad format":          {"/script", 1, "", line, false, true},
		"runc 1.2":            {"/script", 255, "", line, false, true},
		"terminal":            {"/script", 1, strings.ReplaceAll(line, "\n", "\r\n"), "", true, true},
		"no interpreter":      {"/script", 1, "", "exec /script: no such file or directory\n", false, true},
		"no permission":       {"/script", 1, "", "exec /script: permission denied\n", false, true},
		"too many arguments":  {"/script", 1, "", "exec /script: argument list too long\n", false, true},
		"found in PATH":       {"script", 1, "", "exec /usr/bin/script: exec format error\n", false, true},
		"relative":            {"./script", 1, "", "exec ./script: exec format error\n", false, true},
		"spaces and lines":    {"/a b\nc", 1, "", "exec /a b\nc: exec format error\n", false, true},
		"another command":     {"/sh", 1, "", line, false, false},
		"suffix of the name":  {"ript", 1, "", line, false, false},
		"another directory":   {"/script", 1, "", "exec /x/script: exec format error\n", false, false},
		"another exit code":   {"/script", 2, "", line, false, false},
		"success":             {"/script", 0, "", line, false, false},
		"unknown error":       {"/script", 1, "", "exec /script: no luck\n", false, false},
		"output on stdout":    {"/script", 1, "x", line, false, false},
		"two lines":           {"/script", 1, "", line + line, false, false},
		"another line before": {"/script", 1, "", "x\n" + line, false, false},
		"no newline":          {"/script", 1, "", strings.TrimSpace(line), false, false},
		"on stdout":           {"/script", 1, line, "", false, false},
		"long output":         {"/script", 1, "", strings.Repeat("x", maxStartText-len(line)) + line, false, false},
		"no output":           {"/script", 1, "", "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := isRefused(c.cmd, c.code, []byte(c.stdout), []byte(c.stderr), c.tty); got != c.want {
				t.Errorf("isRefused = %v, want %v", got, c.want)
			}
		})
	}
}

// TestExecOfRefusedCommand checks that the exit code is the same as a shell's, and that runc's
// message stays in its stream.
func TestExecOfRefusedCommand(t *testing.T) {
	const line, failed = "exec /script: exec format error\r\n", `"Running":false,"Pid":7,"ExitCode":1`
	e := execServer(t, true, line, failed)
	var out bytes.Buffer
	code, err := e.Exec(t.Context(), model.ContainerID(idA),
		Exec{Cmd: []string{"/script"}, Streams: Streams{TTY: true, Stdout: &out}})
	if err != nil || code != exitCannotExecute || out.String() != line {
		t.Errorf("exit code %d, error %v, output %q", code, err, out.String())
	}

	e = execServer(t, false, line, failed)
	out.Reset()
	code, err = e.Exec(t.Context(), model.ContainerID(idA),
		Exec{Cmd: []string{"/script"}, Streams: Streams{Stdout: &out}})
	if err != nil || code != 1 || out.String() != line {
		t.Errorf("same text on stdout: exit code %d, error %v, output %q", code, err, out.String())
	}
}
