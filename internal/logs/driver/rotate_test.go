package driver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReopen(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	if err := d.Reopen(t.Context(), c.id); !errors.Is(err, ErrUnknown) {
		t.Errorf("Reopen before the start: error %v, want ErrUnknown", err)
	}

	c.start()
	var want, got []string
	for i := range 20 {
		c.print(fmt.Sprint("line ", i))
		want = append(want, fmt.Sprint("stdout F line ", i))
		if i%5 == 4 {
			if err := os.Rename(c.log.String(), fmt.Sprintf("%s.%02d", c.log, i)); err != nil {
				t.Fatal(err)
			}

			if err := d.Reopen(t.Context(), c.id); err != nil {
				t.Fatal(err)
			}

			if _, err := os.Stat(c.log.String()); err != nil {
				t.Errorf("no log after Reopen: %v", err)
			}
		}
	}

	c.stop()
	files, err := rotatedFiles(t, c.log)
	if err != nil || len(files) != 4 {
		t.Errorf("rotated: %v, %v", files, err)
	}

	for _, f := range append(files, c.log.String()) {
		got = append(got, texts(t, f)...)
	}

	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// rotatedFiles returns the paths of a log's rotated files.
func rotatedFiles(t *testing.T, log target) (files []string, err error) {
	t.Helper()
	dir, err := log.openDir(false)
	if err != nil {
		return nil, err
	}
	defer dir.Close()

	names, err := log.listRotated(dir)
	for _, name := range names {
		files = append(files, filepath.Join(dir.Name(), name))
	}

	return files, err
}

// TestFileIsFoundDuringRename expects a file to be found while the kubelet renames it, in either
// direction.
func TestFileIsFoundDuringRename(t *testing.T) {
	log := target{t.TempDir(), "0.log"}
	f, _, err := log.open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}

	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)

		from, to := log.String(), log.String()+".20260102-030405"
		for tick := time.NewTicker(200 * time.Microsecond); ; from, to = to, from {
			select {
			case <-stop:
				return
			case <-tick.C:
			}

			if err := os.Rename(from, to); err != nil {
				t.Error(err)
			}
		}
	}()

	for range 5000 {
		f, err := log.openByInode(inodeOf(st))
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}

	close(stop)
	<-stopped
}

// TestRotationReverted renames the earlier log back over the new one, like a kubelet without a
// response from Reopen, at once or after lines were written to the new log.
func TestRotationReverted(t *testing.T) {
	for _, test := range []struct {
		name string
		then func(c *container, d *Driver, old string)
		want int // lines
	}{
		{"nothing more is written", func(c *container, _ *Driver, _ string) {
			eventually(c.e.t, "the line is in the log", func() bool { return len(texts(c.e.t, c.log.String())) == 2 })
		}, 2},
		{"more is written", func(c *container, _ *Driver, _ string) { c.print("three"); c.stop() }, 3},
		{"the container ends", func(c *container, _ *Driver, _ string) { c.stop() }, 2},
		{"the process is replaced", func(c *container, d *Driver, _ string) {
			d.Close()
			_, next := newDriver(c.e.t, c.e.dir)
			c.e.http = next.http
			c.stop()
		}, 2},
		{"rotated again", func(c *container, d *Driver, _ string) {
			c.rotate(d)
			c.print("three")
			c.stop()
		}, 3},
	} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, lines between: %v", test.name, written), func(t *testing.T) {
				t.Parallel()
				d, e := newDriver(t, t.TempDir())
				c := e.container("aa")
				c.start()
				c.print("one")
				eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
				start := time.Now()
				old := c.rotate(d)
				c.print("two")
				if written {
					eventually(t, "another line", func() bool { return len(texts(t, c.log.String())) == 1 })
					// A killed process would lose these lines with the file.
					if took := time.Since(start); took < 100*time.Millisecond {
						t.Errorf("a line was written %v after Reopen", took)
					}
				}

				if err := os.Rename(old, c.log.String()); err != nil {
					t.Fatal(err)
				}

				test.then(c, d, old)
				got := append(texts(t, old), texts(t, c.log.String())...)
				if diff := cmp.Diff([]string{"stdout F one", "stdout F two", "stdout F three"}[:test.want],
					got); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// startRotated starts a container with the line one in its rotated log, old, and two in the new
// log.
func startRotated(t *testing.T) (d *Driver, c *container, old string) {
	t.Helper()
	d, e := newDriver(t, t.TempDir())
	c = e.container("aa")
	c.start()
	c.print("one")
	eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
	old = c.rotate(d)
	c.print("two")
	eventually(t, "another line", func() bool { return len(texts(t, c.log.String())) == 1 })

	return d, c, old
}

// TestRotationRevertedAndRepeated renames the earlier log back over the new one, and then once more
// to its rotated name, like a kubelet whose attempts fail while the daemon is restarting.
func TestRotationRevertedAndRepeated(t *testing.T) {
	for _, end := range []bool{false, true} {
		t.Run(fmt.Sprint("the container ends: ", end), func(t *testing.T) {
			t.Parallel()
			d, c, old := startRotated(t)

			s := c.stream(d)
			s.lock() // no check between the renames
			err := errors.Join(os.Rename(old, c.log.String()), os.Rename(c.log.String(), old))
			s.unlock()
			if err != nil {
				t.Fatal(err)
			}

			if !end {
				c.print("three")
				eventually(t, "three lines", func() bool { return len(texts(t, old)) == 3 })
			}

			c.stop()
			want := []string{"stdout F one", "stdout F two", "stdout F three"}
			if end {
				want = want[:2]
			}

			got := append(texts(t, old), texts(t, c.log.String())...)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestCurrentLogDeleted deletes the log just after a rotation. Its lines do not appear again, and
// later ones go to a new log.
func TestCurrentLogDeleted(t *testing.T) {
	t.Parallel()
	_, c, old := startRotated(t)
	if err := os.Remove(c.log.String()); err != nil {
		t.Fatal(err)
	}

	c.print("three")
	c.stop()
	got := append(texts(t, old), texts(t, c.log.String())...)
	if diff := cmp.Diff([]string{"stdout F one", "stdout F three"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestDaemonStopsDuringRotation disconnects the daemon after a rotation. The kubelet may not have
// received the response. So the new log must stay empty long enough for a slow kubelet to rename
// the earlier one back without a loss, even if this process is killed too.
func TestDaemonStopsDuringRotation(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir())
	daemon, disconnect := context.WithCancel(t.Context())
	defer disconnect()

	watched := make(chan struct{})
	go func() {
		defer close(watched)
		e.http.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(daemon, http.MethodGet, watchPath, nil))
	}()

	c := e.container("aa")
	c.start()
	c.print("one")
	eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
	old := c.rotate(d)
	disconnect()
	<-watched
	s := c.stream(d)
	s.lock()
	rotated := s.rotated
	s.unlock()
	if at := d.disconnected.Load(); at == nil || at.Before(rotated) {
		t.Fatalf("the daemon disconnected at %v, before the rotation at %v", at, rotated)
	}

	d.disconnected.Store(&rotated) // a busy machine may have taken longer than holdTime
	c.print("two")
	time.Sleep(3 * holdTime)
	d.Close()
	if err := os.Rename(old, c.log.String()); err != nil {
		t.Fatal(err)
	}

	_, next := newDriver(t, e.dir)
	e.http = next.http
	eventually(t, "two lines", func() bool { return len(texts(t, c.log.String())) == 2 })
	c.stop()
}
