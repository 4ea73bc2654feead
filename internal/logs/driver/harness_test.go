package driver

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"

	"cri-dockerd/internal/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// began is one nanosecond before the time of a fake engine's first line. Each line is a nanosecond
// later.
var began = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// fakeEngine implements Docker's side of the protocol.
type fakeEngine struct {
	t    *testing.T
	dir  string
	http http.Handler
	n    int64
}

func (e *fakeEngine) call(path string, body any) string {
	e.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		e.t.Fatal(err)
	}

	w := httptest.NewRecorder()
	e.http.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, bytes.NewReader(b)))
	var reply struct{ Err string }
	if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
		e.t.Fatalf("%s: %v in %q", path, err, w.Body)
	}

	return reply.Err
}

// container is a container of the fake engine.
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

// idOf returns the ID of a container with a short name.
func idOf(name string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(name))) }

// stream returns the container's newest stream, or nil.
func (c *container) stream(d *Driver) *stream { return d.findContainer(model.ContainerID(c.id)) }

// open creates the FIFO and holds it open like Docker.
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

// frame returns a message with its prefix, in Docker's format.
func (c *container) frame(f frame, last bool) []byte {
	c.e.n++
	f.Time = began.UnixNano() + c.e.n
	b := appendFrame(nil, f)
	if last { // Docker marks the last piece of a line as partial as well
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

func (c *container) print(lines ...string) {
	c.e.t.Helper()
	for _, l := range lines {
		if _, err := c.fifo.Write(c.frame(frame{Source: "stdout", Line: []byte(l)}, false)); err != nil {
			c.e.t.Fatal(err)
		}
	}
}

// rotate renames the log like the kubelet, and opens a new one. It returns the old log's name.
func (c *container) rotate(d *Driver) (old string) {
	c.e.t.Helper()
	old = c.log.String() + ".20260102-030405"
	if err := errors.Join(os.Rename(c.log.String(), old), d.Reopen(c.e.t.Context(), c.id)); err != nil {
		c.e.t.Fatal(err)
	}
	return old
}

// texts returns the lines of a log without their times.
func texts(t *testing.T, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}

	var out []string
	for l := range strings.Lines(string(b)) {
		stamp, record, _ := strings.Cut(l, " ")
		if _, err := time.Parse(timeLayout, stamp); err != nil || !strings.HasSuffix(record, "\n") {
			t.Errorf("record %q: %v", l, err)
		}
		out = append(out, strings.TrimSuffix(record, "\n"))
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

// awaitReconciled waits until all resumed streams are reconciled.
func (d *Driver) awaitReconciled() {
	for _, s := range d.all() {
		s.lock()
		s.unlock() //nolint:staticcheck // only to wait
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// checkTableIsEmpty fails the test if the driver's table has files.
func checkTableIsEmpty(t *testing.T, d *Driver) {
	t.Helper()
	if files, err := os.ReadDir(d.table.dir); err != nil || len(files) > 0 {
		t.Errorf("the table has files %v, %v", files, err)
	}
}

func (e *fakeEngine) newTarget(id string) target {
	return target{filepath.Join(e.dir, "pods/default_web_uid"), "main-" + id + "/0.log"}
}
