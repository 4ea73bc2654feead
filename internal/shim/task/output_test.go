package task

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
)

const token = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

// newExec returns the request of an exec with the engine's FIFOs.
func newExec(t *testing.T) *api.ExecProcessRequest {
	t.Helper()
	dir := t.TempDir()
	r := &api.ExecProcessRequest{
		ID:     "a",
		ExecID: "x",
		Stdout: filepath.Join(dir, "stdout"),
		Stderr: filepath.Join(dir, "stderr"),
	}
	if err := errors.Join(unix.Mkfifo(r.Stdout, 0o600), unix.Mkfifo(r.Stderr, 0o600)); err != nil {
		t.Fatal(err)
	}

	return r
}

// TestRedirect verifies that the output goes into the daemon's FIFOs, and that the engine's FIFOs
// end with the exec.
func TestRedirect(t *testing.T) {
	var o outputs
	r, dir := newExec(t), t.TempDir()
	var daemon, engine []*os.File
	for _, name := range annotation.OutputFiles(token) {
		if err := unix.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
		daemon = append(daemon, openEnd(t, filepath.Join(dir, name)))
	}
	for _, name := range []string{r.Stdout, r.Stderr} {
		engine = append(engine, openEnd(t, name))
	}

	if err := o.redirect(r, dir, token); err != nil {
		t.Fatal(err)
	}

	for i, name := range []string{r.Stdout, r.Stderr} { // as runc's service does
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, "output"); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}

		_ = engine[i].SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := engine[i].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the engine's FIFO has output, or has ended: %v", err)
		}
	}

	o.release("a", "other")
	o.release("a", "x")
	for i := range engine {
		_ = engine[i].SetReadDeadline(time.Time{})
		if got, err := io.ReadAll(engine[i]); len(got) > 0 || err != nil {
			t.Errorf("the engine has the output %q, %v", got, err)
		}
		if got, err := io.ReadAll(daemon[i]); string(got) != "output" || err != nil {
			t.Errorf("the daemon has the output %q, %v", got, err)
		}
	}
}

// openEnd opens the read end of a FIFO.
func openEnd(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })

	return f
}

// TestRedirectRefuses verifies that an exec is unchanged unless the daemon's directory has both
// FIFOs.
func TestRedirectRefuses(t *testing.T) {
	first, second := annotation.OutputFiles(token)[0], annotation.OutputFiles(token)[1]
	outside := filepath.Join(t.TempDir(), "outside")
	if err := unix.Mkfifo(outside, 0o600); err != nil {
		t.Fatal(err)
	}

	for name, create := range map[string]func(dir string) error{
		"no FIFO":  func(string) error { return nil },
		"one FIFO": func(dir string) error { return unix.Mkfifo(filepath.Join(dir, first), 0o600) },
		"a file": func(dir string) error {
			return errors.Join(unix.Mkfifo(filepath.Join(dir, first), 0o600),
				os.WriteFile(filepath.Join(dir, second), nil, 0o600))
		},
		"a link out of the directory": func(dir string) error {
			return errors.Join(unix.Mkfifo(filepath.Join(dir, first), 0o600),
				os.Symlink(outside, filepath.Join(dir, second)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			var o outputs
			r, dir := newExec(t), t.TempDir()
			if err := create(dir); err != nil {
				t.Fatal(err)
			}

			stdout, stderr := r.Stdout, r.Stderr
			err := o.redirect(r, dir, token)
			if err == nil || r.Stdout != stdout || r.Stderr != stderr || len(o.files) > 0 {
				t.Errorf("%v, request %v, files %v", err, r, o.files)
			}
		})
	}
}

// TestRedirectKeepsTerminals verifies that a terminal is not redirected.
func TestRedirectKeepsTerminals(t *testing.T) {
	var o outputs
	r := newExec(t)
	r.Terminal, r.Stderr = true, ""
	stdout := r.Stdout
	if err := o.redirect(r, t.TempDir(), token); err != nil || r.Stdout != stdout {
		t.Errorf("%v, %v", err, r)
	}
}
