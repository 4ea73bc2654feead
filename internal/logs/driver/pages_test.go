package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
)

// pageSizes are the capacities of pipes when root's pipe pages are exhausted: two pages, or one on
// kernels before 5.14.
var pageSizes = []int{4 << 10, 8 << 10}

func withPipes(size int) func(*Config) { return func(c *Config) { c.pipeSize = size } }

// writeTimeout limits the write of a frame.
const writeTimeout = 20 * time.Second

// write writes frames like the engine. It waits while the FIFO is full.
func (c *container) write(frames ...[]byte) error {
	f, err := os.OpenFile(c.FIFOPath, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}

	if err := f.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return errors.Join(err, f.Close())
	}

	for _, b := range frames {
		if _, err := f.Write(b); err != nil {
			return errors.Join(err, f.Close())
		}
	}

	return f.Close()
}

// pieces returns the frames of lines of 20 kB, cut by Docker at 16 KiB, and their records.
func (c *container) pieces(lines int) (frames [][]byte, want []string) {
	for i := range lines {
		line := fmt.Sprintf("%06d", i) + strings.Repeat("x", 20000-6)
		first, second := line[:pieceSize], line[pieceSize:]
		frames = append(frames,
			c.frame(frame{Source: "stdout", Line: []byte(first), Partial: true}, false),
			c.frame(frame{Source: "stdout", Line: []byte(second)}, true))
		want = append(want, "stdout P "+first, "stdout F "+second)
	}

	return frames, want
}

// TestPipePagesExhausted writes frames larger than a pipe among short ones. All must arrive, and an
// alarm must explain the slowdown.
func TestPipePagesExhausted(t *testing.T) {
	for _, size := range pageSizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			d, e := newDriver(t, t.TempDir(), withPipes(size))
			c := e.container("aa")
			c.start()
			frames, want := c.pieces(50)
			short := c.frame(frame{Source: "stderr", Line: []byte("short")}, false)
			frames, want = append([][]byte{short}, frames...), append([]string{"stderr F short"}, want...)
			nine := c.frame(frame{Source: "stdout", Line: []byte(strings.Repeat("y", 9000))}, false)
			frames, want = append(frames, nine), append(want, "stdout F "+strings.Repeat("y", 9000))
			if err := c.write(frames...); err != nil {
				t.Fatal(err)
			}

			c.stop()
			if diff := cmp.Diff(want, texts(t, c.log.String())); diff != "" {
				t.Errorf("log differs: %.2000s", diff)
			}
			if alarms := d.alarms.list(); !slices.Equal(alarms, []string{alarmText[alarmPipes]}) {
				t.Errorf("alarms: %q", alarms)
			}
			if n := testutil.ToFloat64(d.metrics.spilled); n < 51 {
				t.Errorf("%v frames were spilled, want at least 51", n)
			}
			checkTableIsEmpty(t, d)
		})
	}
}

// TestPipePagesAvailableAgain expects pipes to grow when pages are available again, and the alarm
// to clear.
func TestPipePagesAvailableAgain(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir())
	b, err := newScratch(4 << 10)
	if err != nil {
		t.Fatal(err)
	}

	b.limit, b.lastGrow = 0, time.Time{}
	d.alarms.add(alarmPipes, countSmall(b.size))
	d.buffers.put(b)
	c := e.container("aa")
	c.start()
	s := c.stream(d)
	s.lock()
	if s.size, err = unix.FcntlInt(uintptr(s.fifo), unix.F_SETPIPE_SZ, 4<<10); err != nil {
		t.Fatal(err)
	}

	s.lastGrow = time.Time{}
	d.alarms.add(alarmPipes, countSmall(s.size))
	s.unlock()
	if len(d.alarms.list()) != 1 {
		t.Fatalf("alarms: %q", d.alarms.list())
	}

	eventually(t, "the alarm ends", func() bool { return len(d.alarms.list()) == 0 })
	s.lock()
	if s.size != fifoSize || b.size != batchSize {
		t.Errorf("the FIFO has %d bytes, the pipe %d", s.size, b.size)
	}

	s.unlock()
	c.stop()
}

// TestKilledWithASpill creates the state of a process killed while a frame moves through the spill,
// for every step.
func TestKilledWithASpill(t *testing.T) {
	for _, state := range []string{
		"beginning moved", "prefix cut", "whole, not written", "whole, torn", "whole, written",
	} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			d, e := newDriver(t, dir, withPipes(4<<10))
			c := e.container("aa")
			c.start()
			d.Close()
			line := strings.Repeat("x", 9000)
			b := c.frame(frame{Source: "stdout", Line: []byte(line)}, false)
			moved := map[string]int{"beginning moved": 4096, "prefix cut": 2}[state]
			if moved == 0 {
				moved = len(b)
			}

			part := filepath.Join(dir, "table", filepath.Base(c.FIFOPath)+spillSuffix)
			if err := os.WriteFile(part, b[:moved], 0o600); err != nil {
				t.Fatal(err)
			}

			var k clock
			record := k.appendRecords(nil, frame{Source: "stdout", Time: began.UnixNano() + c.e.n, Line: []byte(line)})
			switch state {
			case "whole, torn":
				record = record[:5000]
			case "whole, written":
			default:
				record = nil
			}

			if err := os.WriteFile(c.log.String(), record, 0o600); err != nil {
				t.Fatal(err)
			}

			_, next := newDriver(t, dir, withPipes(4<<10))
			e.http = next.http
			if err := c.write(b[moved:], c.frame(frame{Source: "stdout", Line: []byte("after")}, false)); err != nil {
				t.Fatal(err)
			}

			c.stop()
			if diff := cmp.Diff([]string{"stdout F " + line, "stdout F after"}, texts(t, c.log.String())); diff != "" {
				t.Errorf("log differs: %.500s", diff)
			}
		})
	}
}

// sealed returns a file limited to size bytes.
func sealed(t *testing.T, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("spill", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}

	f := os.NewFile(uintptr(fd), "spill")
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}

	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}

	return f
}

// TestSpillCannotBeWritten expects pieces to stay in memory without room for the spill's file.
func TestSpillCannotBeWritten(t *testing.T) {
	for _, room := range []int64{-1, 0, 2, 4096, 6000} {
		t.Run(fmt.Sprint(room), func(t *testing.T) {
			d, e := newDriver(t, t.TempDir(), withPipes(4<<10))
			c := e.container("aa")
			c.start()
			s := c.stream(d)
			s.lock()
			if room < 0 {
				s.spill.path = filepath.Join(t.TempDir(), "missing", "x.part")
			} else {
				s.spill.file = sealed(t, room)
			}

			s.unlock()
			frames, want := c.pieces(3)
			if err := c.write(frames...); err != nil {
				t.Fatal(err)
			}

			c.stop()
			if diff := cmp.Diff(want, texts(t, c.log.String())); diff != "" {
				t.Errorf("log differs: %.500s", diff)
			}
		})
	}
}

// TestDiskHangsWithSmallPipes drops frames larger than a pipe while the disk does not respond.
func TestDiskHangsWithSmallPipes(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir(), withPipes(4<<10), func(c *Config) { c.StallLimit = 50 * time.Millisecond })
	c := e.container("aa")
	c.start()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}

	s := c.stream(d)
	s.lock()
	good := s.log
	s.log = w
	s.unlock()
	frames, _ := c.pieces(20)
	if err := c.write(frames...); err != nil {
		t.Fatal(err)
	}

	r.Close() // the stalled write fails
	eventually(t, "the disk responds", func() bool { return d.droppedLines(reasonStalled) > 0 })
	s.lock()
	s.log = good
	s.unlock()
	w.Close()
	if err := c.write(c.frame(frame{Source: "stdout", Line: []byte("after")}, false)); err != nil {
		t.Fatal(err)
	}

	c.stop()
	got := texts(t, c.log.String())
	if len(got) == 0 || got[len(got)-1] != "stdout F after" {
		t.Errorf("the log ends with %.100q", got)
	}
}
