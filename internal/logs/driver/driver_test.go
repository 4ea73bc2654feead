package driver

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"

	"cri-dockerd/internal/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// began is the time of the first line that a fake engine sends; each has a nanosecond more.
var began = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// fakeEngine is Docker's side of the protocol.
type fakeEngine struct {
	t    *testing.T
	dir  string
	http http.Handler
	n    int64
	mu   sync.Mutex // guards lines
	sent []string
}

func (e *fakeEngine) call(path string, body any) string {
	e.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		e.t.Fatal(err)
	}

	w := httptest.NewRecorder()
	e.http.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, bytes.NewReader(b)))
	var answer struct{ Err string }
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		e.t.Fatalf("%s: %v in %q", path, err, w.Body)
	}

	return answer.Err
}

// container is one that runs on the fake engine.
type container struct {
	e        *fakeEngine
	id       string
	fifo     *os.File
	log      target
	FIFOPath string
}

func (e *fakeEngine) container(id string) *container {
	e.t.Helper()
	c := &container{
		e:        e,
		id:       idOf(id),
		FIFOPath: filepath.Join(e.dir, "fifo-"+id),
		log:      target{filepath.Join(e.dir, "pods/default_web_uid"), "main-" + id + "/0.log"},
	}

	c.open()

	return c
}

// idOf is the ID of a container with a short name.
func idOf(name string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(name))) }

// stream is the container's newest one, nil without one.
func (c *container) stream(d *Driver) *stream { return d.of(model.ContainerID(c.id)) }

// open makes the FIFO and holds it open as Docker does.
func (c *container) open() {
	c.e.t.Helper()
	if err := syscall.Mkfifo(c.FIFOPath, 0o700); err != nil {
		c.e.t.Fatal(err)
	}

	f, err := os.OpenFile(c.FIFOPath, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		c.e.t.Fatal(err)
	}

	c.fifo = f
	c.e.t.Cleanup(func() { f.Close() })
}

func (c *container) info() map[string]any {
	return map[string]any{
		"ContainerID":   c.id,
		"ContainerName": "/k8s_" + c.id,
		"Config":        map[string]string{OptionDirectory: c.log.Directory, OptionPath: c.log.Path},
	}
}

func (c *container) start() {
	c.e.t.Helper()
	if err := c.e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": c.info()}); err != "" {
		c.e.t.Fatalf("StartLogging: %s", err)
	}
}

func (c *container) stop() {
	c.e.t.Helper()
	if err := c.e.call("/LogDriver.StopLogging", map[string]any{"File": c.FIFOPath}); err != "" {
		c.e.t.Fatalf("StopLogging: %s", err)
	}
}

// frame is a message with its prefix, as Docker writes it.
func (c *container) frame(f frame, last bool) []byte {
	c.e.n++
	f.Time = began.UnixNano() + c.e.n
	b := appendFrame(nil, f)
	if last { // Docker marks the last piece of a line as partial also
		b = protowire.AppendTag(b, fieldPartial, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
		meta := protowire.AppendTag(nil, 2, protowire.BytesType)
		meta = protowire.AppendString(meta, "some-id")
		meta = protowire.AppendTag(meta, fieldLast, protowire.VarintType)
		meta = protowire.AppendVarint(meta, 1)
		b = protowire.AppendTag(b, fieldMetadata, protowire.BytesType)
		b = protowire.AppendBytes(b, meta)
		binary.BigEndian.PutUint32(b, uint32(len(b)-prefixSize))
	}

	return b
}

func (c *container) say(lines ...string) {
	c.e.t.Helper()
	for _, l := range lines {
		if _, err := c.fifo.Write(c.frame(frame{Source: "stdout", Line: []byte(l)}, false)); err != nil {
			c.e.t.Fatal(err)
		}
	}
}

// rotate renames the log, as the kubelet does, and has a new one opened. It returns the old one's
// name.
func (c *container) rotate(d *Driver) (old string) {
	c.e.t.Helper()
	old = c.log.String() + ".20260102-030405"
	if err := errors.Join(os.Rename(c.log.String(), old), d.Reopen(c.e.t.Context(), c.id)); err != nil {
		c.e.t.Fatal(err)
	}
	return old
}

// texts are the lines of a log without their times.
func texts(t *testing.T, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}

	var out []string
	for l := range strings.Lines(string(b)) {
		stamp, rest, _ := strings.Cut(l, " ")
		if _, err := time.Parse(timeLayout, stamp); err != nil || !strings.HasSuffix(rest, "\n") {
			t.Errorf("record %q: %v", l, err)
		}
		out = append(out, strings.TrimSuffix(rest, "\n"))
	}

	return out
}

func newDriver(t *testing.T, dir string, change ...func(*Config)) (*Driver, *fakeEngine) {
	t.Helper()
	cfg := Config{
		Directory: filepath.Join(dir, "table"),
		FIFOs:     dir,
		Version:   "test",
		Pause:     time.Millisecond,
		Log:       slog.New(slog.NewTextHandler(t.Output(), nil)),
	}

	for _, c := range change {
		c(&cfg)
	}

	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(d.Close)

	return d, &fakeEngine{t: t, dir: dir, http: d.Handler()}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestOutputIsWritten(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir)
	c := e.container("aa")
	c.start()
	c.start() // Docker asks again when it got no answer
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
		t.Errorf("the first time is %.40q, want %s; %v", b, first, err)
	}

	if st, err := os.Stat(c.log.String()); err != nil || st.Mode().Perm() != fileMode {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	if left, _ := os.ReadDir(d.table.dir); len(left) > 0 {
		t.Errorf("the table still has %v", left)
	}

	c.stop() // unknown by now
}

func TestTimes(t *testing.T) {
	var c clock
	for _, want := range []time.Time{began, began.Add(999999999), began.Add(time.Second), began.Add(-time.Second),
		time.Unix(-1, 5), time.Unix(0, 0)} {
		got, err := time.Parse(time.RFC3339Nano, string(c.append(nil, want.UnixNano())))
		if err != nil || !got.Equal(want) {
			t.Errorf("%v became %v, %v", want, got, err)
		}
	}
}

// TestKilledAtAnyMoment makes the state that a killed process leaves behind, for every number of
// frames and bytes that it had written and not yet consumed, and lets a new one take over.
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
				say := func(i int) {
					c.say(fmt.Sprint("line ", i))
					want = append(want, fmt.Sprint("stdout F line ", i))
				}

				for i := range before {
					say(i)
				}

				eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == before })
				d.Close()
				mark := e.n
				for i := range waiting {
					say(before + i)
				}

				// What the killed one had written of these.
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
				if renamed { // by the kubelet, which had not yet asked to reopen
					if err := os.Rename(c.log.String(), old); err != nil {
						t.Fatal(err)
					}
				}

				_, next := newDriver(t, dir)
				e.http = next.http
				say(before + waiting)
				if renamed && written%2 == 0 { // and renames it back, since nobody answered
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

func TestReopen(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	if err := d.Reopen(t.Context(), c.id); !errors.Is(err, ErrUnknown) {
		t.Errorf("before its start: %v", err)
	}

	c.start()
	var want, got []string
	for i := range 20 {
		c.say(fmt.Sprint("line ", i))
		want = append(want, fmt.Sprint("stdout F line ", i))
		if i%5 == 4 {
			if err := os.Rename(c.log.String(), fmt.Sprintf("%s.%02d", c.log, i)); err != nil {
				t.Fatal(err)
			}

			if err := d.Reopen(t.Context(), c.id); err != nil {
				t.Fatal(err)
			}

			if _, err := os.Stat(c.log.String()); err != nil {
				t.Errorf("after Reopen: %v", err)
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

// rotatedFiles are the paths of a log's rotated files.
func rotatedFiles(t *testing.T, log target) (files []string, err error) {
	t.Helper()
	dir, err := log.directory(false)
	if err != nil {
		return nil, err
	}
	defer dir.Close()

	names, err := log.rotated(dir)
	for _, name := range names {
		files = append(files, filepath.Join(dir.Name(), name))
	}

	return files, err
}

// TestFileThatIsBeingRenamed: a process that starts finds its file also while the kubelet renames
// it, there or back.
func TestFileThatIsBeingRenamed(t *testing.T) {
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
		f, err := log.byInode(inodeOf(st))
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}

	close(stop)
	<-stopped
}

// TestRotationTakenBack: the kubelet got no answer from Reopen and renames the earlier log back
// over the new one, at once or after lines were written to that.
func TestRotationTakenBack(t *testing.T) {
	for _, test := range []struct {
		name string
		then func(c *container, d *Driver, old string)
		want int // lines
	}{
		{"nothing more is written", func(c *container, _ *Driver, _ string) {
			eventually(c.e.t, "the line is in the log", func() bool { return len(texts(c.e.t, c.log.String())) == 2 })
		}, 2},
		{"more is written", func(c *container, _ *Driver, _ string) { c.say("three"); c.stop() }, 3},
		{"the container ends", func(c *container, _ *Driver, _ string) { c.stop() }, 2},
		{"the process is renewed", func(c *container, d *Driver, _ string) {
			d.Close()
			_, next := newDriver(c.e.t, c.e.dir)
			c.e.http = next.http
			c.stop()
		}, 2},
		{"rotated again", func(c *container, d *Driver, _ string) {
			c.rotate(d)
			c.say("three")
			c.stop()
		}, 3},
	} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, lines between: %v", test.name, written), func(t *testing.T) {
				t.Parallel()
				d, e := newDriver(t, t.TempDir())
				c := e.container("aa")
				c.start()
				c.say("one")
				eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
				asked := time.Now()
				old := c.rotate(d)
				c.say("two")
				if written {
					eventually(t, "another line", func() bool { return len(texts(t, c.log.String())) == 1 })
					// what a killed process has written would be lost with the file
					if took := time.Since(asked); took < 100*time.Millisecond {
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

// TestDaemonGoesDuringRotation: nobody knows whether the kubelet got its answer, so the new log
// stays empty for long enough that also a kubelet that is slow to rename the earlier one back loses
// nothing, even if this process is killed too.
func TestDaemonGoesDuringRotation(t *testing.T) {
	t.Parallel()
	d, e := newDriver(t, t.TempDir())
	daemon, goes := context.WithCancel(t.Context())
	defer goes()

	watched := make(chan struct{})
	go func() {
		defer close(watched)
		e.http.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(daemon, http.MethodGet, watchPath, nil))
	}()

	c := e.container("aa")
	c.start()
	c.say("one")
	eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
	old := c.rotate(d)
	goes()
	<-watched
	s := c.stream(d)
	s.lock()
	rotated := s.rotated
	s.unlock()
	if left := d.left.Load(); left == nil || left.Before(rotated) {
		t.Fatalf("the daemon has gone at %v, after the rotation at %v", left, rotated)
	}

	d.left.Store(&rotated) // also on a machine that is busy for longer than the rest
	c.say("two")
	time.Sleep(3 * restTime)
	d.Close()
	if err := os.Rename(old, c.log.String()); err != nil {
		t.Fatal(err)
	}

	_, next := newDriver(t, e.dir)
	e.http = next.http
	eventually(t, "two lines", func() bool { return len(texts(t, c.log.String())) == 2 })
	c.stop()
}

// TestEngineRestarted: an engine that was killed leaves a FIFO, and its successor brings another
// for the same container.
func TestEngineRestarted(t *testing.T) {
	for variant := range 16 {
		driverDown, renamed, away, renewed := variant&1 > 0, variant&2 > 0, variant&4 > 0, variant&8 > 0
		dir := t.TempDir()
		d, e := newDriver(t, dir)
		c := e.container("aa")
		c.start()
		c.say("one", "two")
		if driverDown {
			d.Close()
			c.say("three")
			var next *fakeEngine
			d, next = newDriver(t, dir)
			e.http = next.http
		} else {
			c.say("three")
		}

		first := c.FIFOPath
		c.fifo.Close()
		if away { // for so long that the first stream has ended
			eventually(t, "the first stream is forgotten", func() bool { return c.stream(d) == nil })
		}

		if renewed { // this process, before there is another engine
			eventually(t, "three lines", func() bool { return len(texts(t, c.log.String())) == 3 })
			d.Close()
			var next *fakeEngine
			d, next = newDriver(t, dir)
			e.http = next.http
		}

		c.FIFOPath += "-2"
		c.open()
		old := c.log.String() + ".20260102-030405"
		if renamed { // by the kubelet, which has no answer to Reopen yet
			if err := os.Rename(c.log.String(), old); err != nil {
				t.Fatal(err)
			}
		}

		c.start()
		c.say("four")
		if renamed { // and never gets one
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
			left, _ := os.ReadDir(filepath.Join(dir, "table"))
			return len(left) == 0
		})
	}
}

// TestEngineOpensLate: the engine may open the FIFO for writing after its StartLogging.
func TestEngineOpensLate(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.fifo.Close()
	c.start()
	s := c.stream(d)
	eventually(t, "it has been looked at", func() bool { return !s.mayOpen() || len(s.buffers.idle) > 0 })
	f, err := os.OpenFile(c.FIFOPath, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}

	c.fifo = f
	c.say("one")
	c.stop()
	f.Close()
	if diff := cmp.Diff([]string{"stdout F one"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

func TestLogDirectoryDeleted(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	c.say("one")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if err := os.RemoveAll(c.log.Directory); err != nil {
		t.Fatal(err)
	}

	s := c.stream(d)
	s.lock()
	s.checked = time.Time{} // a second later
	s.unlock()
	c.say("two")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if diff := cmp.Diff([]string{"stdout F two"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
	if err := os.RemoveAll(c.log.Directory); err != nil {
		t.Fatal(err)
	}

	c.stop()
	if _, err := os.Stat(c.log.Directory); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the end of the container has made the directory again: %v", err)
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
		c.say(strings.Repeat("lost ", 20))
	}

	eventually(t, "all is dropped", func() bool { return d.droppedLines(reasonDisk) == 5000 })
	s.lock()
	s.log = good
	s.unlock()
	full.Close()
	c.say("again")
	c.stop()
	if diff := cmp.Diff([]string{"stdout F again"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

// limited sets the process's limit of file size, in bytes, until lift is called: the disk takes a
// part of a batch. The tests' own files are limited too.
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

func TestDiskTakesAPart(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	lift := limited(t, 1000)
	for i := range 100 {
		c.say(fmt.Sprint("line ", i))
	}

	c.stop()
	lift()
	got := texts(t, c.log.String()) // no torn line
	if n := len(got); n == 0 || n > 99 || d.droppedLines(reasonDisk) != float64(100-n) {
		t.Errorf("%d lines are written, %v dropped", n, d.droppedLines(reasonDisk))
	}
}

// TestDiskHangs writes to a pipe that nobody reads.
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
		c.say(fmt.Sprintf("line %06d %s", i, strings.Repeat("x", 200)))
	}

	eventually(t, "output is dropped", func() bool { return len(s.busy) == 1 })
	read := make(chan int)
	go func() {
		b, _ := io.ReadAll(r)
		read <- bytes.Count(b, []byte("\n"))
	}()

	eventually(t, "the batch that hung is over", func() bool { return d.droppedLines(reasonStalled) > 0 })
	c.say("after all")
	c.stop()
	if n := float64(<-read); n+d.droppedLines(reasonStalled)+d.droppedLines(reasonDisk) != lines+1 {
		t.Errorf("%v lines written and %v dropped of %d", n, d.droppedLines(reasonStalled), lines+1)
	}
}

func TestMalformed(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	c.say("one")
	eventually(t, "written", func() bool { return len(texts(t, c.log.String())) == 1 })
	if _, err := c.fifo.Write([]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}

	eventually(t, "it is counted", func() bool { return d.droppedLines(reasonMalformed) == 1 })
	if _, err := c.fifo.Write([]byte{0, 0, 0, 9, 1}); err != nil { // cut, as by a killed engine
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
		fr, n, err := next(b)
		if err == nil && (n < prefixSize || n > len(b) || len(fr.Line) > n) {
			t.Errorf("%d of %d bytes: %+v", n, len(b), fr)
		}
	})
}

func TestPathsOutOfTheDirectory(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir)
	outside := filepath.Join(dir, "outside")
	pod := filepath.Join(dir, "pods/p")
	for _, make := range []error{
		os.MkdirAll(outside, 0o755), os.MkdirAll(pod, 0o755), os.Symlink(outside, filepath.Join(pod, "link")),
		os.Mkdir(filepath.Join(pod, "dir"), 0o755),
	} {
		if make != nil {
			t.Fatal(make)
		}
	}

	before := len(openFiles(t))
	for _, log := range []target{
		{}, {"relative", "0.log"}, {"/", "0.log"}, {pod, ""}, {pod, "."}, {pod, "../x"}, {pod, "/etc/passwd"},
		{pod, "a/../../x"},
		{pod, "link/0.log"}, {pod, "dir"}, {filepath.Join(pod, "link"), "0.log"}, {pod, "a\nb"},
		{pod, strings.Repeat("x", 256)},
		{pod, strings.Repeat("x/", 3000)}, {filepath.Join(pod, "\x1b[2J"), "0.log"},
	} {
		c := e.container("x")
		c.log = log
		if err := e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": c.info()}); err == "" {
			t.Errorf("%+v is accepted", log)
		} else if strings.Contains(err, "panic") {
			t.Error(err)
		}

		c.fifo.Close()
		if err := os.Remove(c.FIFOPath); err != nil {
			t.Fatal(err)
		}
	}

	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("outside: %v", left)
	}
	if left, _ := os.ReadDir(d.table.dir); len(left) > 0 {
		t.Errorf("the table has %v", left)
	}
	if after := openFiles(t); len(after) > before {
		t.Errorf("left open: %v", after)
	}

	for _, body := range []string{"", "{", `{"File":"x"}`, `{"File":"/x","Info":{}}`} {
		w := httptest.NewRecorder()
		e.http.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/LogDriver.StartLogging", strings.NewReader(body)))
		if !strings.Contains(w.Body.String(), `"Err":"`) || strings.Contains(w.Body.String(), `"Err":""`) {
			t.Errorf("%q: %s", body, w.Body)
		}
	}
}

// openFiles are the process's files but sockets, which belong to others.
func openFiles(t *testing.T) []string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}

	var out []string
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "/") {
			out = append(out, to)
		}
	}

	return out
}

func TestManyShortContainers(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir, func(c *Config) { c.EngineAway = time.Nanosecond })
	before := len(openFiles(t))
	for i := range 10000 {
		c := e.container(fmt.Sprint(i % 7))
		c.start()
		c.say("hello")
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

	c := e.container("last") // with it goes what was kept for engines that have not come back
	c.start()
	c.stop()
	c.fifo.Close()
	eventually(t, "all is closed", func() bool { return len(openFiles(t)) <= before+maxIdleScratch })
	n := 0
	for i := range 7 {
		n += len(texts(t, e.newTarget(fmt.Sprint(i)).String()))
	}

	if n != 10000 {
		t.Errorf("%d lines", n)
	}
	if left, _ := os.ReadDir(d.table.dir); len(left) > 0 {
		t.Errorf("the table has %v", left)
	}
}

func (e *fakeEngine) newTarget(id string) target {
	return target{filepath.Join(e.dir, "pods/default_web_uid"), "main-" + id + "/0.log"}
}

// logsOf is what docker logs gets.
func logsOf(ctx context.Context, t *testing.T, url string, c *container, cfg readConfig) (next func() (string, bool)) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"Info": c.info(), "Config": cfg})
	if err != nil {
		t.Fatal(err)
	}

	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/LogDriver.ReadLogs", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}

	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("ReadLogs: %v, %v", resp, err)
	}

	t.Cleanup(func() { resp.Body.Close() })

	return func() (string, bool) {
		head := make([]byte, prefixSize)
		if _, err := io.ReadFull(resp.Body, head); err != nil {
			return "", false
		}

		body := make([]byte, binary.BigEndian.Uint32(head))
		if _, err := io.ReadFull(resp.Body, body); err != nil {
			t.Fatal(err)
		}

		f, err := decode(body)
		if err != nil {
			t.Fatal(err)
		}

		return string(f.Line), true
	}
}

func all(next func() (string, bool)) (out []string) {
	for s, ok := next(); ok; s, ok = next() {
		out = append(out, s)
	}
	return out
}

// logged is a container with a log to read, and the driver's server.
type logged struct {
	*container
	t   *testing.T
	d   *Driver
	url string
}

func newLogged(t *testing.T) *logged {
	t.Helper()
	d, e := newDriver(t, t.TempDir())
	server := httptest.NewServer(d.Handler())
	t.Cleanup(func() { http.DefaultClient.CloseIdleConnections(); server.Close() })
	return &logged{e.container("aa"), t, d, server.URL}
}

func (l *logged) read(cfg readConfig) (next func() (string, bool)) {
	return logsOf(l.t.Context(), l.t, l.url, l.container, cfg)
}

// rotate renames the log, as the kubelet does, and compresses it.
func (l *logged) rotate(name string, compress bool) {
	l.t.Helper()
	s := l.container.stream(l.d)
	s.lock()
	s.drainLocked()
	s.unlock()
	log := l.log.String()
	b, err := os.ReadFile(log)
	if err != nil {
		l.t.Fatal(err)
	}

	if compress {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(b)
		w.Close()
		err = errors.Join(os.WriteFile(log+name+".gz", z.Bytes(), 0o600), os.Remove(log))
	} else {
		err = os.Rename(log, log+name)
	}

	if err := errors.Join(err, l.d.Reopen(l.t.Context(), l.id)); err != nil {
		l.t.Fatal(err)
	}
}

func TestReadLogs(t *testing.T) {
	l := newLogged(t)
	if got := all(l.read(readConfig{Tail: -1})); got != nil {
		t.Errorf("before its start: %q", got)
	}

	l.start()
	l.say("1", "2")
	l.rotate(".20260102-030405", true)
	l.say("3", "4")
	l.rotate(".20260102-030406", false)
	if _, err := l.fifo.Write(l.frame(frame{Source: "stdout", Line: []byte("5"), Partial: true}, false)); err != nil {
		t.Fatal(err)
	}

	l.say("", "6")
	if err := os.WriteFile(l.log.String()+".20260102-030406.tmp", []byte("being compressed"), 0o600); err != nil {
		t.Fatal(err)
	}

	eventually(t, "written", func() bool { return len(texts(t, l.log.String())) == 3 })
	for _, test := range []struct {
		cfg  readConfig
		want []string
	}{
		{readConfig{Tail: -1}, []string{"1\n", "2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 0}, nil},
		{readConfig{Tail: 1}, []string{"6\n"}},
		{readConfig{Tail: 3}, []string{"4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 5}, []string{"2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 100}, []string{"1\n", "2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: -1, Since: began.Add(4)}, []string{"4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: -1, Until: began.Add(2)}, []string{"1\n", "2\n"}},
	} {
		if diff := cmp.Diff(test.want, all(l.read(test.cfg))); diff != "" {
			t.Errorf("%+v: %s", test.cfg, diff)
		}
	}

	l.stop()
}

func TestFollow(t *testing.T) {
	l := newLogged(t)
	l.start()
	l.say("1", "2", "3")
	eventually(t, "written", func() bool { return len(texts(t, l.log.String())) == 3 })
	next := l.read(readConfig{Tail: 2, Follow: true})
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got, ok := next(); got != w || !ok {
				t.Fatalf("follow: %q, want %q", got, w)
			}
		}
	}

	expect("2\n", "3\n")
	for i := range 10 {
		l.say(fmt.Sprint("new ", i))
		expect(fmt.Sprintf("new %d\n", i))
		l.rotate(fmt.Sprintf(".20260102-0305%02d", i), i%2 == 0)
	}

	none := l.read(readConfig{Tail: 0, Follow: true})
	l.say("last")
	l.stop()
	expect("last\n")
	if s, ok := next(); ok {
		t.Errorf("after the end: %q", s)
	}
	if diff := cmp.Diff([]string{"last\n"}, all(none)); diff != "" {
		t.Errorf("from now on: %s", diff)
	}

	ctx, cancel := context.WithCancel(t.Context())
	c2 := l.e.container("bb")
	c2.start()
	gone := logsOf(ctx, t, l.url, c2, readConfig{Tail: -1, Follow: true})
	cancel() // a reader that goes away leaves nothing
	_, _ = gone()
	c2.stop()
}

func TestClient(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	socket := filepath.Join(t.TempDir(), "s.sock")
	client := NewClient(socket)
	if _, _, err := client.Watch(t.Context(), nil); !errdefs.IsUnavailable(err) {
		t.Errorf("nobody there: %v", err)
	}

	if err := client.Reopen(t.Context(), idOf("aa")); !errdefs.IsUnavailable(err) {
		t.Errorf("nobody there: %v", err)
	}

	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	server := &http.Server{Handler: d.Handler()}
	go func() { _ = server.Serve(l) }()
	changes := make(chan Status, 10)
	s, gone, err := client.Watch(t.Context(), func(s Status) { changes <- s })
	if err != nil || s.Control != controlVersion || s.Version != "test" || s.PID != os.Getpid() {
		t.Fatalf("%+v, %v", s, err)
	}

	if err := client.Reopen(t.Context(), idOf("aa")); !errdefs.IsNotFound(err) {
		t.Errorf("unknown: %v", err)
	}

	d.alarms.raise(alarmTable)
	if s := <-changes; len(s.Alarms) != 1 {
		t.Errorf("with an alarm: %+v", s)
	}

	d.alarms.lower(alarmTable)
	if s := <-changes; len(s.Alarms) != 0 || s.PID != os.Getpid() {
		t.Errorf("without an alarm: %+v", s)
	}

	c := e.container("aa")
	c.start()
	if err := os.Remove(c.log.String()); err != nil {
		t.Fatal(err)
	}

	if err := client.Reopen(t.Context(), idOf("aa")); err != nil {
		t.Error(err)
	}

	if _, err := os.Stat(c.log.String()); err != nil {
		t.Error(err)
	}

	if isClosed(gone) {
		t.Error("gone while it serves")
	}

	server.Close()
	<-gone
	c.stop()
}

func TestPluginProtocol(t *testing.T) {
	_, e := newDriver(t, t.TempDir())
	for path, want := range map[string]string{
		"/Plugin.Activate":        `{"Implements":["LogDriver"]}`,
		"/LogDriver.Capabilities": `{"Cap":{"ReadLogs":true}}`,
	} {
		w := httptest.NewRecorder()
		e.http.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, nil))
		if got := strings.TrimSpace(w.Body.String()); got != want {
			t.Errorf("%s: %s", path, got)
		}
	}

	w := httptest.NewRecorder()
	e.http.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, m := range []string{"cri_dockerd_log_lines_total 0",
		`cri_dockerd_log_dropped_lines_total{reason="stalled"} 0`, "cri_dockerd_log_streams 0"} {
		if !slices.Contains(strings.Split(w.Body.String(), "\n"), m) {
			t.Errorf("no %s in\n%s", m, w.Body)
		}
	}
}

// TestTableThatCannotBeRead: a file of the table that was torn, or that somebody has made, is set
// aside, and all others are taken up.
func TestTableThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	table := filepath.Join(dir, "table")
	d, e := newDriver(t, dir)
	c := e.container("aa")
	c.start()
	d.Close()

	good := filepath.Join(table, filepath.Base(c.FIFOPath)+".json")
	entry, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}

	outside := filepath.Join(dir, "outside")
	broken := map[string]string{
		"torn.json":      string(entry[:len(entry)/2]),
		"empty.json":     "",
		"huge.json":      strings.Repeat(" ", maxEntry) + string(entry),
		"other.json":     string(entry),
		"deep.json":      strings.Repeat("[", 20000),
		"escape.json":    strings.ReplaceAll(string(entry), dir+"/fifo", dir+"/../fifo"),
		"relative.json":  strings.ReplaceAll(string(entry), c.log.Directory, "pods"),
		"container.json": strings.ReplaceAll(string(entry), c.id, "../../x"),
	}

	for name, text := range broken {
		if err := os.WriteFile(filepath.Join(table, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	for _, err := range []error{
		os.WriteFile(outside, []byte("{}"), 0o600),
		os.Symlink(outside, filepath.Join(table, "link.json")),
		syscall.Mkfifo(filepath.Join(table, "fifo.json"), 0o600),
		os.WriteFile(filepath.Join(table, "x.json.new"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(table, "stray.part"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(table, "other"), []byte("?"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	next, again := newDriver(t, dir)
	e.http = again.http
	if alarms := next.alarms.list(); !slices.Equal(alarms, []string{alarmText[alarmTable]}) {
		t.Errorf("alarms: %q", alarms)
	}

	for name := range broken {
		if _, err := os.Lstat(filepath.Join(table, name+brokenSuffix)); err != nil {
			t.Errorf("%s is not set aside: %v", name, err)
		}
	}

	for _, name := range []string{"x.json.new", "stray.part", "link.json", "fifo.json"} {
		if _, err := os.Lstat(filepath.Join(table, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}

	c.say("one")
	c.stop()
	if diff := cmp.Diff([]string{"stdout F one"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

// TestSpillThatCannotBeRead: the beginning of a frame that was torn, or that somebody has made, is
// set aside. The container's output goes on.
func TestSpillThatCannotBeRead(t *testing.T) {
	for name, spoil := range map[string]func(file string) error{
		"huge":      func(file string) error { return os.WriteFile(file, make([]byte, batchSize+1), 0o600) },
		"directory": func(file string) error { return os.Mkdir(file, 0o700) },
		"link":      func(file string) error { return os.Symlink("/dev/zero", file) },
		"FIFO":      func(file string) error { return syscall.Mkfifo(file, 0o600) },
		"more than its frame": func(file string) error {
			return os.WriteFile(file, append([]byte{0, 0, 0, 2}, make([]byte, 100)...), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			d.Close()
			if err := spoil(d.table.spillFile(&c.stream(d).entry)); err != nil {
				t.Fatal(err)
			}

			_, again := newDriver(t, dir)
			e.http = again.http
			c.say("one")
			c.stop()
			if got := texts(t, c.log.String()); !slices.Contains(got, "stdout F one") {
				t.Errorf("the log holds %q", got)
			}
		})
	}
}

// TestTableEntryIsChecked: an entry under its right name is set aside too if it names what a
// request must not.
func TestTableEntryIsChecked(t *testing.T) {
	for name, change := range map[string]func(e *entry, dir string){
		"FIFO elsewhere":     func(e *entry, dir string) { e.FIFO = filepath.Join(dir, "sub", filepath.Base(e.FIFO)) },
		"no container":       func(e *entry, _ string) { e.Container = "../../x" },
		"relative directory": func(e *entry, _ string) { e.Log.Directory = "pods" },
		"path out":           func(e *entry, _ string) { e.Log.Path = "../../outside" },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			d.Close()
			row := c.stream(d).entry
			file := d.table.entryFile(&row)
			change(&row, dir)
			b, err := json.Marshal(row)
			if err != nil {
				t.Fatal(err)
			}

			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}

			next, _ := newDriver(t, dir)
			if _, err := os.Lstat(file + brokenSuffix); err != nil || len(next.alarms.list()) != 1 {
				t.Errorf("it is not set aside: %v, %q", err, next.alarms.list())
			}
		})
	}
}

// TestEngineStaysAway: what is known of a container is kept for an engine that comes back, through
// any number of processes, but not for ever.
func TestEngineStaysAway(t *testing.T) {
	dir := t.TempDir()
	rows := filepath.Join(dir, "table")
	if err := os.Mkdir(rows, 0o700); err != nil {
		t.Fatal(err)
	}

	gone := entry{
		FIFO:      filepath.Join(dir, "fifo"),
		Container: model.ContainerID(idOf("x")),
		Log:       target{dir, "0.log"},
		Inode:     7,
	}
	if err := (&table{dir: rows}).keep(&gone); err != nil {
		t.Fatal(err)
	}

	for range 3 {
		d, _ := newDriver(t, dir)
		if o := d.orphans.find(model.ContainerID(idOf("x"))); o.Inode != 7 || o.Orphaned.IsZero() {
			t.Errorf("kept: %+v", o)
		}
		d.Close()
	}

	// Nothing else happens on the node.
	d, _ := newDriver(t, dir, func(c *Config) { c.EngineAway = time.Millisecond })
	var left []os.DirEntry
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		left, _ = os.ReadDir(rows)
		if len(left) == 0 && d.orphans.find(model.ContainerID(idOf("x"))).Inode == 0 {
			return
		}
	}

	t.Errorf("kept too long: %v", left)
}
