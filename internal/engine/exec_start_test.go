package engine

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const runcText = "OCI runtime exec failed: exec failed: unable to start container process: "

// TestStartExitCode classifies error messages of runc and crun.
func TestStartExitCode(t *testing.T) {
	for _, c := range []struct {
		cmd, text string
		want      int // 0: the command is not the cause
	}{

		{"/no/such", runcText + `exec: "/no/such": stat /no/such: no such file or directory: unknown`, 127},
		{"nosuch", runcText + `exec: "nosuch": executable file not found in $PATH: unknown`, 127},
		{"/etc/passwd/x", runcText + `exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory: unknown`, 127},
		{"/script", runcText + `exec /script: no such file or directory: unknown`, 126},
		{"script", runcText + `exec /usr/bin/script: exec format error: unknown`, 126},
		{"/etc/passwd", runcText + `exec: "/etc/passwd": permission denied: unknown`, 126},
		{"/dev/shm/x", runcText + `eaccess /dev/shm/x: permission denied: unknown`, 126},
		{"/x", runcText + `eaccess /dev/shm: permission denied: unknown`, 0},
		{"/etc", runcText + `exec: "/etc": is a directory: unknown`, 126},
		{`a"b`, runcText + `exec: "a\"b": executable file not found in $PATH: unknown`, 127},
		{"a.*(b", runcText + `exec: "a.*(b": executable file not found in $PATH: unknown`, 127},
		{"nosuch", "OCI runtime exec failed: executable file `nosuch` not found in $PATH: No such file or " +
			"directory: unknown", 127},
		{"sh", runcText + `chdir to cwd ("/no/such") set in config.json failed: no such file or directory: unknown`, 0},
		{"sh", "unable to find user nobody9: no matching entries in passwd file", 0},
		{"sh", `Container 0123 is not running`, 0},
		{"sh", "", 0},
	} {
		t.Run(c.cmd+" "+c.text, func(t *testing.T) {
			code, ok := startExitCode(c.cmd, c.text)
			if code != c.want || ok != (c.want != 0) {
				t.Errorf("startExitCode = %d, %v; want %d", code, ok, c.want)
			}
		})
	}
}

// execServer returns an engine with an exec in a given state. The command has written output to
// stdout, as one message.
func execServer(t *testing.T, tty bool, output, state string) *Engine {
	return engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/exec"):
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, `{"Id":"%s"}`, idB)
		case strings.HasSuffix(p, "/start"):
			_, _ = io.Copy(io.Discard, r.Body)
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()

			fmt.Fprint(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
			if !tty {
				n := len(output)
				_, _ = conn.Write([]byte{1, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
			}
			_, _ = io.WriteString(conn, output)

		case strings.HasSuffix(p, "/json"):
			fmt.Fprintf(w, `{"ID":"%s",%s}`, idB, state)
		}
	}))
}

// TestExecOfUnknownCommand checks that the engine's message appears once, on stderr, and that the
// output of a command stays on stdout, even with the same text.
func TestExecOfUnknownCommand(t *testing.T) {
	const (
		missing = runcText + `exec: "nosuch": executable file not found in $PATH: unknown`
		noUser  = "unable to find user nobody9: no matching entries in passwd file"
		failed  = `"Running":false,"Pid":0,"ExitCode":126`
	)

	for name, c := range map[string]struct {
		tty                   bool
		output, state         string
		code                  int
		stdout, stderr, error string
	}{
		"unknown command": {
			output: missing + "\r\n", state: failed,
			code: 127, stderr: missing + "\n",
		},
		"terminal": {
			tty: true, output: missing + "\r\n", state: failed,
			code: 127, stdout: missing + "\r\n",
		},
		"another failure": {
			output: noUser + "\r\n", state: failed,
			error: noUser,
		},
		"same text by the command": {
			output: missing + "\r\n", state: `"Running":false,"Pid":7,"ExitCode":126`,
			code: 126, stdout: missing + "\r\n",
		},
		"no output": {
			state: `"Running":false,"Pid":7,"ExitCode":3`,
			code:  3,
		},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			e := execServer(t, c.tty, c.output, c.state)
			code, err := e.Exec(t.Context(), model.ContainerID(idA), Exec{
				Cmd:     []string{"nosuch"},
				Streams: Streams{TTY: c.tty, Stdout: &stdout, Stderr: &stderr},
			})
			if code != c.code || stdout.String() != c.stdout || stderr.String() != c.stderr {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout.String(), stderr.String())
			}

			if (err != nil) != (c.error != "") || err != nil &&
				(!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.error)) {
				t.Errorf("error %v, want %q", err, c.error)
			}
		})
	}
}
