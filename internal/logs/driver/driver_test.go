package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestOutputIsWritten(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir)
	c := e.container("aa")
	c.start()
	c.start() // Docker retries after a lost response
	long := strings.Repeat("x", 3*pieceSize+7)
	for _, b := range [][]byte{
		c.frame(frame{Source: "stdout", Line: []byte("one")}, false),
		c.frame(frame{Source: "stderr", Line: []byte("two \r")}, false),
		c.frame(frame{Source: "stdout", Line: nil}, false),
		c.frame(frame{Source: "stdout", Line: []byte("pie"), Partial: true}, false),
		c.frame(frame{Source: "stdout", Line: []byte("ce")}, true),
		c.frame(frame{Source: "stdout", Line: []byte(long)}, false),
	} {
		if _, err := c.fifo.Write(b); err != nil {
			t.Fatal(err)
		}
	}

	c.stop()
	want := []string{"stdout F one", "stderr F two \r", "stdout F ", "stdout P pie", "stdout F ce",
		"stdout P " + long[:pieceSize], "stdout P " + long[:pieceSize], "stdout P " + long[:pieceSize],
		"stdout F xxxxxxx"}
	if diff := cmp.Diff(want, texts(t, c.log.String())); diff != "" { // complete when StopLogging returns
		t.Error(diff)
	}

	b, err := os.ReadFile(c.log.String())
	if first := began.Add(1).Local().Format(timeLayout); err != nil || !strings.HasPrefix(string(b), first+" ") {
		t.Errorf("the first record is %.40q, want time %s; %v", b, first, err)
	}

	if st, err := os.Stat(c.log.String()); err != nil || st.Mode().Perm() != fileMode {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	checkTableIsEmpty(t, d)
	c.stop() // unknown by now
}

func TestTimes(t *testing.T) {
	var c clock
	for _, want := range []time.Time{began, began.Add(999999999), began.Add(time.Second), began.Add(-time.Second),
		time.Unix(-1, 5), time.Unix(0, 0)} {
		got, err := time.Parse(time.RFC3339Nano, string(c.append(nil, want.UnixNano())))
		if err != nil || !got.Equal(want) {
			t.Errorf("%v was formatted as %v, %v", want, got, err)
		}
	}
}

// TestKilledAtAnyMoment creates the state of a killed process, for every number of frames and bytes
// written and not yet consumed, and starts a new process.
func TestKilledAtAnyMoment(t *testing.T) {
	const before, waiting = 3, 4
	for _, renamed := range []bool{false, true} {
		for torn := range 60 {
			for written := range waiting + 1 {
				dir := t.TempDir()
				d, e := newDriver(t, dir)
				c := e.container("aa")
				c.start()
				var want []string
				print := func(i int) {
					c.print(fmt.Sprint("line ", i))
					want = append(want, fmt.Sprint("stdout F line ", i))
				}

				for i := range before {
					print(i)
				}

				eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == before })
				d.Close()
				mark := e.n
				for i := range waiting {
					print(before + i)
				}

				// The lines written by the killed process.
				var b []byte
				var k clock
				ends := []int{0}
				for i := range waiting {
					b = k.appendRecords(b, frame{
						Source: "stdout",
						Time:   began.UnixNano() + mark + 1 + int64(i),
						Line:   fmt.Append(nil, "line ", before+i),
					})
					ends = append(ends, len(b))
				}

				end := min(ends[written]+torn, len(b))
				f, err := os.OpenFile(c.log.String(), os.O_WRONLY|os.O_APPEND, 0)
				if err != nil {
					t.Fatal(err)
				}

				if _, err := f.Write(b[:end]); err != nil {
					t.Fatal(err)
				}

				f.Close()
				old := c.log.String() + ".20260102-030405"
				if renamed { // by the kubelet, before its call of Reopen
					if err := os.Rename(c.log.String(), old); err != nil {
						t.Fatal(err)
					}
				}

				d, next := newDriver(t, dir)
				e.http = next.http
				d.awaitReconciled() // until then the log may end with a part of a line
				print(before + waiting)
				if renamed && written%2 == 0 { // and renames it back, without a response
					eventually(t, "written", func() bool { return len(texts(t, old)) == len(want) })
					if err := os.Rename(old, c.log.String()); err != nil {
						t.Fatal(err)
					}
				}

				c.stop()
				got := append(texts(t, old), texts(t, c.log.String())...)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("renamed %v, %d frames and %d bytes written: %s", renamed, written, torn, diff)
				}
			}
		}
	}
}

// TestEngineRestarted kills an engine. It leaves a FIFO behind, and its successor creates another
// one for the same container.
func TestEngineRestarted(t *testing.T) {
	for variant := range 16 {
		driverDown, renamed, absent, replaced := variant&1 > 0, variant&2 > 0, variant&4 > 0, variant&8 > 0
		dir := t.TempDir()
		d, e := newDriver(t, dir)
		c := e.container("aa")
		c.start()
		c.print("one", "two")
		if driverDown {
			d.Close()
			c.print("three")
			var next *fakeEngine
			d, next = newDriver(t, dir)
			e.http = next.http
		} else {
			c.print("three")
		}

		first := c.FIFOPath
		c.fifo.Close()
		if absent { // until the first stream has ended
			eventually(t, "the first stream is forgotten", func() bool { return c.stream(d) == nil })
		}

		if replaced { // the log-driver process, before the engine's successor starts
			eventually(t, "three lines", func() bool { return len(texts(t, c.log.String())) == 3 })
			d.Close()
			var next *fakeEngine
			d, next = newDriver(t, dir)
			e.http = next.http
		}

		c.FIFOPath += "-2"
		c.open()
		old := c.log.String() + ".20260102-030405"
		if renamed { // by the kubelet, still without a response from Reopen
			if err := os.Rename(c.log.String(), old); err != nil {
				t.Fatal(err)
			}
		}

		c.start()
		c.print("four")
		if renamed { // the response never arrives
			eventually(t, "four lines", func() bool { return len(texts(t, old))+len(texts(t, c.log.String())) == 4 })
			if err := os.Rename(old, c.log.String()); err != nil {
				t.Fatal(err)
			}
		}

		c.stop()
		if diff := cmp.Diff([]string{"stdout F one", "stdout F two", "stdout F three", "stdout F four"},
			texts(t, c.log.String())); diff != "" {
			t.Error(diff)
		}

		eventually(t, "the first FIFO is removed", func() bool {
			_, err := os.Lstat(first)
			return errors.Is(err, os.ErrNotExist)
		})

		eventually(t, "the table is empty", func() bool {
			files, _ := os.ReadDir(filepath.Join(dir, "table"))
			return len(files) == 0
		})
	}
}

// TestEngineOpensLate opens the FIFO for writing after StartLogging.
func TestEngineOpensLate(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.fifo.Close()
	c.start()
	s := c.stream(d)
	eventually(t, "the FIFO has been read", func() bool { return !s.isAwaitingWriter() || len(s.buffers.idle) > 0 })
	f, err := os.OpenFile(c.FIFOPath, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}

	c.fifo = f
	c.print("one")
	c.stop()
	f.Close()
	if diff := cmp.Diff([]string{"stdout F one"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

func TestManyShortContainers(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir, func(c *Config) { c.SuccessorTimeout = time.Nanosecond })
	before := len(openFiles(t))
	for i := range 10000 {
		c := e.container(fmt.Sprint(i % 7))
		c.start()
		c.print("hello")
		if i%3 == 0 {
			c.fifo.Close() // the engine dies
			eventually(t, "forgotten", func() bool { return c.stream(d) == nil })
			continue
		}

		c.stop()
		c.fifo.Close()
		if err := os.Remove(c.FIFOPath); err != nil {
			t.Fatal(err)
		}
	}

	c := e.container("last") // its end removes the entries of dead engines
	c.start()
	c.stop()
	c.fifo.Close()
	eventually(t, "all is closed", func() bool { return len(openFiles(t)) <= before+maxIdleScratch })
	n := 0
	for i := range 7 {
		n += len(texts(t, e.newTarget(fmt.Sprint(i)).String()))
	}

	if n != 10000 {
		t.Errorf("%d lines, want 10000", n)
	}

	checkTableIsEmpty(t, d)
}
