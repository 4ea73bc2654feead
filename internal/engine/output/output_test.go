package output

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cri-dockerd/internal/shim/annotation"
)

func copyAll(to io.Writer, from io.Reader) error {
	_, err := io.Copy(to, from)
	return err
}

// openShimEnds opens the FIFOs of an exec like the shim.
func openShimEnds(t *testing.T, dir, token string) (files [2]*os.File) {
	t.Helper()
	for i, name := range annotation.OutputFiles(token) {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		files[i] = f
	}

	return files
}

// open creates the FIFOs of an exec. It checks that none remain after the test.
func open(t *testing.T) (d *Output, dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "exec")
	d, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		d.Close()
		d.readers.Wait()
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("FIFOs remain: %v, %v", left, err)
		}
	})

	return d, dir
}

// TestOutput verifies that all output arrives, of both streams and after the exit.
func TestOutput(t *testing.T) {
	d, dir := open(t)
	var out, errOut bytes.Buffer
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)

	d.Start(&out, &errOut, copyAll, cancel)
	ends := openShimEnds(t, dir, d.token)
	text := strings.Repeat("a line of output\n", 100_000)
	written := make(chan error, 2)
	go func() {
		_, err := io.WriteString(ends[0], text)
		written <- errors.Join(err, ends[0].Close())
	}()
	go func() {
		_, err := io.WriteString(ends[1], "an error")
		time.Sleep(50 * time.Millisecond) // until finish waits
		written <- errors.Join(err, ends[1].Close())
	}()

	err := errors.Join(d.Finish(ctx), <-written, <-written)
	if err != nil || out.String() != text || errOut.String() != "an error" {
		t.Errorf("%v, %d bytes, %q", err, out.Len(), errOut.String())
	}
}

// TestOutputWithoutShim verifies that an exec ends whose FIFOs were never opened: the command
// failed to start, or the shim does not know them.
func TestOutputWithoutShim(t *testing.T) {
	d, _ := open(t)
	d.Start(io.Discard, io.Discard, copyAll, func(error) {})
	if err := d.Finish(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestOutputOfBackground verifies that a background process does not delay the end of a
// session for long, neither a silent one nor one that writes.
func TestOutputOfBackground(t *testing.T) {
	d, dir := open(t)
	d.timeout = 100 * time.Millisecond
	d.pipes[1].idle = 10 * time.Millisecond
	var out bytes.Buffer
	d.Start(&out, io.Discard, copyAll, func(error) {})
	ends := openShimEnds(t, dir, d.token)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				_, _ = ends[0].Write([]byte("more"))
			}
		}
	}()

	if err := d.Finish(t.Context()); err != nil || out.Len() == 0 {
		t.Errorf("%v, %d bytes", err, out.Len())
	}

	close(stop)
	<-stopped
	if err := errors.Join(ends[0].Close(), ends[1].Close()); err != nil {
		t.Error(err)
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

// TestOutputWithoutClient verifies that the error of a writer ends the session, and that the
// command can write on.
func TestOutputWithoutClient(t *testing.T) {
	d, dir := open(t)
	broken := errors.New("broken connection")
	ctx, cancel := context.WithCancelCause(t.Context())
	d.Start(brokenWriter{broken}, io.Discard, copyAll, cancel)
	ends := openShimEnds(t, dir, d.token)
	if _, err := io.WriteString(ends[0], "first"); err != nil {
		t.Fatal(err)
	}

	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}

	d.Close()
	if _, err := ends[0].Write(make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	if err := errors.Join(ends[0].Close(), ends[1].Close()); err != nil {
		t.Error(err)
	}
}

// TestLeftovers verifies that the next process reads the output of a lost session, until the end of
// the command.
func TestLeftovers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "exec")
	if l, err := FindLeftovers(dir); err != nil || len(l.pipes) > 0 {
		t.Fatalf("%v, %v", l, err)
	}

	lost, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}

	ends := openShimEnds(t, dir, lost.token)
	for _, p := range lost.pipes { // like the end of the process
		_ = p.read.Close()
		_ = p.write.Close()
	}

	for range 2 { // processes
		l, err := FindLeftovers(dir)
		if err != nil {
			t.Fatal(err)
		}

		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { l.Discard(ctx, copyAll); close(done) }()

		if _, err := ends[0].Write(make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		cancel()
		<-done
	}

	l, err := FindLeftovers(dir)
	if err := errors.Join(err, ends[0].Close(), ends[1].Close()); err != nil {
		t.Fatal(err)
	}

	l.Discard(t.Context(), copyAll)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("FIFOs remain: %v, %v", left, err)
	}
}
