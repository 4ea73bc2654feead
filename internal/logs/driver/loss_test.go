package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestLogDirectoryDeleted(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	c.print("one")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if err := os.RemoveAll(c.log.Directory); err != nil {
		t.Fatal(err)
	}

	s := c.stream(d)
	s.lock()
	s.checked = time.Time{} // a second later
	s.unlock()
	c.print("two")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if diff := cmp.Diff([]string{"stdout F two"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
	if err := os.RemoveAll(c.log.Directory); err != nil {
		t.Fatal(err)
	}

	c.stop()
	if _, err := os.Stat(c.log.Directory); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the end of the container created the directory again: %v", err)
	}
}

func (d *Driver) droppedLines(reason string) float64 {
	return testutil.ToFloat64(d.metrics.dropped.WithLabelValues(reason))
}

func TestFullDisk(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}

	s := c.stream(d)
	s.lock()
	good := s.log
	s.log = full
	s.unlock()
	for range 5000 { // more than the FIFO holds
		c.print(strings.Repeat("lost ", 20))
	}

	eventually(t, "all is dropped", func() bool { return d.droppedLines(reasonDisk) == 5000 })
	s.lock()
	s.log = good
	s.unlock()
	full.Close()
	c.print("again")
	c.stop()
	if diff := cmp.Diff([]string{"stdout F again"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

// limited sets the process's file size limit, in bytes, until lift is called, so that the disk
// accepts a part of a batch. The limit also applies to the test's own files.
func limited(t *testing.T, size uint64) (lift func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}

	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: size, Max: old.Max}); err != nil {
		t.Fatal(err)
	}

	lift = func() { _ = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old) }
	t.Cleanup(lift)

	return lift
}

func TestPartialWrite(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	lift := limited(t, 1000)
	for i := range 100 {
		c.print(fmt.Sprint("line ", i))
	}

	c.stop()
	lift()
	got := texts(t, c.log.String()) // no torn line
	if n := len(got); n == 0 || n > 99 || d.droppedLines(reasonDisk) != float64(100-n) {
		t.Errorf("%d lines written, %v dropped, want a total of 100", n, d.droppedLines(reasonDisk))
	}
}

// TestDiskHangs writes to a pipe without a reader.
func TestDiskHangs(t *testing.T) {
	d, e := newDriver(t, t.TempDir(), func(c *Config) { c.StallLimit = 50 * time.Millisecond })
	c := e.container("aa")
	c.start()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()

	s := c.stream(d)
	s.lock()
	s.log.Close()
	s.log = w
	s.unlock()
	const lines = 20000 // some MiB, more than the pipe and the FIFO hold together
	for i := range lines {
		c.print(fmt.Sprintf("line %06d %s", i, strings.Repeat("x", 200)))
	}

	eventually(t, "output is dropped", func() bool { return len(s.busy) == 1 })
	read := make(chan int)
	go func() {
		b, _ := io.ReadAll(r)
		read <- bytes.Count(b, []byte("\n"))
	}()

	eventually(t, "the stalled batch is complete", func() bool { return d.droppedLines(reasonStalled) > 0 })
	c.print("after all")
	c.stop()
	if n := float64(<-read); n+d.droppedLines(reasonStalled)+d.droppedLines(reasonDisk) != lines+1 {
		t.Errorf("%v lines written and %v dropped of %d", n, d.droppedLines(reasonStalled), lines+1)
	}
}

func TestMalformed(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	c.print("one")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if _, err := c.fifo.Write([]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}

	eventually(t, "the message is counted", func() bool { return d.droppedLines(reasonMalformed) == 1 })
	if _, err := c.fifo.Write([]byte{0, 0, 0, 9, 1}); err != nil { // incomplete, as from a killed engine
		t.Fatal(err)
	}

	c.stop()
	if diff := cmp.Diff([]string{"stdout F one"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

func FuzzNext(f *testing.F) {
	c := container{e: &fakeEngine{}}
	f.Add(c.frame(frame{Source: "stdout", Line: []byte("one")}, true))
	f.Add([]byte{0, 0, 0, 3, 0x2a, 0x01, 0x08})
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, n, err := nextFrame(b)
		if err == nil && (n < prefixSize || n > len(b) || len(fr.Line) > n) {
			t.Errorf("%d of %d bytes: %+v", n, len(b), fr)
		}
	})
}

// hangOpens makes each open of a file in a directory wait until release is called, as on a disk
// that does not respond. The test must not open any meanwhile (fanotify(7), FAN_OPEN_PERM).
func hangOpens(t *testing.T, dir string) (release func()) {
	t.Helper()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC, unix.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}

	release = sync.OnceFunc(func() { unix.Close(fd) })
	t.Cleanup(release)
	err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM|unix.FAN_EVENT_ON_CHILD, unix.AT_FDCWD, dir)
	if err != nil {
		t.Fatal(err)
	}

	return release
}

// printMuch prints more than a FIFO holds. It fails if this blocks, which holds up a container.
func (c *container) printMuch() {
	c.e.t.Helper()
	if err := c.fifo.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		c.e.t.Fatal(err)
	}

	for i := range 10000 {
		c.print(fmt.Sprintf("line %06d %s", i, strings.Repeat("x", 200)))
	}
}

// assertLastLine checks the end of a container's log.
func (c *container) assertLastLine(want string) {
	c.e.t.Helper()
	if got := texts(c.e.t, c.log.String()); len(got) == 0 || got[len(got)-1] != "stdout F "+want {
		c.e.t.Errorf("the log has %d lines and does not end with %q", len(got), want)
	}
}

// TestDiskHangsInRotation expects that a container continues while the disk does not respond to a
// rotation of its log.
func TestDiskHangsInRotation(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir(), func(c *Config) { c.StallLimit = 50 * time.Millisecond })
	c := e.container("aa")
	c.start()
	c.print("one")
	eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })

	if err := os.Rename(c.log.String(), c.log.String()+".20260102-030405"); err != nil {
		t.Fatal(err)
	}

	release := hangOpens(t, filepath.Dir(c.log.String()))
	reopened := make(chan error, 1)
	go func() { reopened <- d.Reopen(context.Background(), c.id) }()
	c.printMuch()
	release()
	if err := <-reopened; err != nil {
		t.Error(err)
	}
	if d.droppedLines(reasonStalled) == 0 {
		t.Error("no dropped line is counted")
	}

	c.print("after")
	c.stop()
	c.assertLastLine("after")
}

// TestDiskHangsAtStart replaces the process while the disk of one log does not respond. The other
// containers' logs are written, and the container itself continues.
func TestDiskHangsAtStart(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir())
	hanging, other := e.container("aa"), e.container("bb")
	for _, c := range []*container{hanging, other} {
		c.start()
		c.print("one")
		eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
	}

	d.Close()
	release := hangOpens(t, filepath.Dir(hanging.log.String()))
	d, next := newDriver(t, e.dir, func(c *Config) { c.StallLimit = 50 * time.Millisecond })
	e.http = next.http
	other.print("two")
	other.stop()
	other.assertLastLine("two")

	hanging.printMuch()
	release()
	eventually(t, "the disk responds", func() bool { return d.droppedLines(reasonStalled) > 0 })
	hanging.print("after")
	hanging.stop()
	hanging.assertLastLine("after")
}
