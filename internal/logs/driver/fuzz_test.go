package driver

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// maxGrowth limits the allocations for one input, in bytes, in addition to the input itself.
const maxGrowth = 32 << 20

// checkAllocations fails the test if do allocates more than maxGrowth.
func checkAllocations(t *testing.T, input int, do func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > maxGrowth+8*uint64(input) {
		t.Errorf("%d bytes of input cause allocations of %d bytes", input, grown)
	}
}

// sandbox is a driver with all files below its directory, beside a foreign file.
type sandbox struct {
	t    *testing.T
	dir  string
	d    *Driver
	fifo string // the FIFO of a container
}

func newSandbox(t *testing.T) *sandbox {
	dir := t.TempDir()
	s := &sandbox{
		t:    t,
		dir:  dir,
		fifo: filepath.Join(dir, "run", "fifo"),
	}

	for _, err := range []error{
		os.Mkdir(filepath.Join(dir, "run"), 0o700),
		os.Mkdir(filepath.Join(dir, "outside"), 0o700),
		unix.Mkfifo(s.fifo, 0o600),
		os.WriteFile(filepath.Join(dir, "outside", "foreign"), []byte(secretText), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	s.open()

	return s
}

func (s *sandbox) open() {
	d, err := New(Config{
		Directory: filepath.Join(s.dir, "table"),
		FIFOs:     filepath.Join(s.dir, "run"),
		Pause:     time.Millisecond,
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		s.t.Fatal(err)
	}

	s.d = d
}

// close closes the driver and checks its files.
func (s *sandbox) close() {
	s.d.Close()
	err := filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		below, _ := filepath.Rel(s.dir, path)
		first, _, _ := strings.Cut(below, "/")
		if !slices.Contains([]string{".", "run", "outside", "table", "pods"}, first) {
			s.t.Errorf("%s was created", path)
		}
		return err
	})

	files, readErr := os.ReadDir(filepath.Join(s.dir, "outside"))
	b, fileErr := os.ReadFile(filepath.Join(s.dir, "outside", "foreign"))
	if err != nil || readErr != nil || fileErr != nil || len(files) != 1 || string(b) != secretText {
		s.t.Errorf("files outside: %v, foreign file %q; %v, %v, %v", files, b, err, readErr, fileErr)
	}
}

// requests are request bodies from Docker and hostile ones. FIFO stands for the FIFO's path, DIR
// for the sandbox's directory.
var requests = []string{
	`{"File":"FIFO","Info":{"ContainerID":"ID","ContainerName":"/x","Config":{"directory":"DIR/pods/p",` +
		`"path":"c/0.log"}}}`,
	`{"File":"FIFO","Info":{"ContainerID":"ID","Config":{"directory":"DIR/pods/p","path":"../../outside/foreign"}}}`,
	`{"File":"FIFO","Info":{"ContainerID":"ID","Config":{"directory":"DIR/pods/../outside","path":"foreign"}}}`,
	`{"File":"DIR/outside/foreign","Info":{"ContainerID":"ID","Config":{"directory":"DIR/pods/p","path":"0.log"}}}`,
	`{"File":"FIFO/../../outside/foreign","Info":{"ContainerID":"../x","Config":{"directory":"/","path":"x"}}}`,
	`{"Info":{"ContainerID":"ID","Config":{"directory":"DIR/pods/p","path":"c/0.log"}},"Config":{"Tail":-1,` +
		`"Follow":false}}`,
	`{"Info":{"ContainerID":"ID","Config":{"directory":"DIR/outside","path":"foreign"}},` +
		`"Config":{"Tail":9223372036854775807,"Since":"2026-01-02T03:04:05Z"}}`,
	`{"File":"FIFO"}`, `{"Container":"ID"}`, `{"Container":null,"File":7}`, `[]`, `null`, `"`, ``,
	`{"Info":{"Config":{"path":["x"]}}}`,
	"{\"File\":\"FIFO\\u0000\",\"Info\":{\"ContainerName\":\"\\ud800\x1b[2J\"}}",
}

// FuzzRequests sends bodies to each call of the plugin protocol. No call may panic, return a long
// response, allocate without a limit, or create any file except logs and files of the table.
func FuzzRequests(f *testing.F) {
	paths := []string{"/LogDriver.StartLogging", "/LogDriver.StopLogging", "/LogDriver.ReadLogs", reopenPath,
		"/Plugin.Activate", "/LogDriver.Capabilities"}
	for i := range paths {
		for _, body := range requests {
			f.Add(uint8(i), body)
		}
	}

	f.Fuzz(func(t *testing.T, call uint8, body string) {
		s := newSandbox(t)
		defer s.close()

		body = strings.NewReplacer("FIFO", s.fifo, "DIR", s.dir, "ID", idOf("x")).Replace(body)
		if strings.Contains(body, "ollow") { // following would wait for the container's end
			body = strings.ReplaceAll(body, "true", "false")
		}
		if hasForeignDirectory(body, s.dir) {
			return // the engine, as root, may choose any directory
		}

		checkAllocations(t, len(body), func() {
			w := httptest.NewRecorder()
			s.d.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, paths[int(call)%len(paths)],
				strings.NewReader(body)))
			if w.Body.Len() > 64<<10 {
				t.Errorf("the response has %d bytes", w.Body.Len())
			}
			if call := int(call) % len(paths); call < 2 && !json.Valid(w.Body.Bytes()) {
				t.Errorf("the response is %q", w.Body)
			}
		})
	})
}

// hasForeignDirectory reports whether a request has a log directory outside dir. The driver would
// create such a log, and the test must not fill the machine with them.
func hasForeignDirectory(body, dir string) bool {
	var r struct{ Info info }
	_ = json.Unmarshal([]byte(body), &r)
	log := r.Info.target()
	return log.check() == nil && !strings.HasPrefix(log.String(), filepath.Join(dir, "pods")+"/")
}

// FuzzFrames writes bytes into a FIFO, with pipes of every size. The result must consist of
// complete records of bounded size, and leave an empty table.
func FuzzFrames(f *testing.F) {
	c := container{e: &fakeEngine{}}
	good := c.frame(frame{Source: "stdout", Line: []byte("one")}, true)
	long := c.frame(frame{Source: "stderr", Line: bytes.Repeat([]byte("x"), 20000), Partial: true}, false)
	for _, seed := range [][]byte{
		good, long, append(slices.Clone(long), good...), good[:7], {0, 0, 0, 0}, {0, 0, 0, 1},
		{0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		{0, 0, 0xff, 0xfc}, bytes.Repeat([]byte{0}, 5000), append([]byte{0, 0, 0, 3, 0x2a, 1, 8}, good...),
		{0, 0, 0, 6, 0x1a, 0xff, 0xff, 0xff, 0xff, 7},
	} {
		f.Add(seed, uint8(1))
		f.Add(seed, uint8(2))
		f.Add(seed, uint8(0))
	}

	f.Fuzz(func(t *testing.T, b []byte, pages uint8) {
		if len(b) > 4*batchSize {
			return // longer than a test needs
		}

		dir := t.TempDir()
		d, e := newDriver(t, dir, func(c *Config) {
			c.pipeSize = int(pages%3) * os.Getpagesize()
			c.Log = slog.New(slog.DiscardHandler)
		})

		c := e.container("aa")
		c.start()
		checkAllocations(t, len(b)*64, func() { // a frame of 4 bytes becomes a record of 50
			if err := c.write(b); err != nil {
				t.Error(err)
			}
			c.stop()
		})

		log, err := os.ReadFile(c.log.String())
		if err != nil || len(log) > 64*len(b)+64 {
			t.Errorf("%d bytes of input became a log of %d, %v", len(b), len(log), err)
		}

		if len(log) > 0 && log[len(log)-1] != '\n' {
			t.Errorf("the last record is incomplete: %q", log[max(0, len(log)-100):])
		}
		checkTableIsEmpty(t, d)
	})
}

// FuzzTable starts a process with an arbitrary table entry and partial frame. It must start, set
// aside unusable files, and change nothing else.
func FuzzTable(f *testing.F) {
	entry := `{"fifo":"FIFO","container":"ID","name":"/x","log":{"directory":"DIR/pods/p","path":"c/0.log"},` +
		`"began":"2026-01-02T03:04:05Z","inode":7}`
	for _, text := range []string{
		entry, entry[:60], "", "{}", "null", "[]", strings.ReplaceAll(entry, "pods/p", "outside"),
		strings.ReplaceAll(entry, "c/0.log", "../../outside/foreign"),
		strings.ReplaceAll(entry, "FIFO", "DIR/outside/foreign"),
		strings.ReplaceAll(entry, "}", `,"orphaned":"2026-01-02T03:04:05Z"}`),
		strings.ReplaceAll(entry, `"FIFO"`, `"FIFO","orphaned":"2026-01-02T03:04:05Z"`), strings.Repeat("[", 20000),
	} {
		f.Add(text, []byte{0, 0, 0, 9, 1})
		f.Add(text, []byte{0xff, 0xff})
	}

	f.Fuzz(func(t *testing.T, text string, part []byte) {
		s := newSandbox(t)
		s.d.Close()
		text = strings.NewReplacer("FIFO", s.fifo, "DIR", s.dir, "ID", idOf("x")).Replace(text)
		var e struct{ Log target }
		_ = json.Unmarshal([]byte(text), &e)
		if e.Log.check() == nil && !strings.HasPrefix(e.Log.String(), filepath.Join(s.dir, "pods")+"/") {
			return // the table, owned by root, may name any directory
		}

		name := filepath.Join(s.dir, "table", filepath.Base(s.fifo))
		for _, err := range []error{
			os.WriteFile(name+entrySuffix, []byte(text), 0o600),
			os.WriteFile(name+spillSuffix, part, 0o600),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}

		checkAllocations(t, len(text)+len(part), func() {
			s.open()
			s.close()
		})
	})
}

// FuzzRecords reads a foreign log in the CRI's format like docker logs.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("2026-01-02T03:04:05.000000006+01:00 stdout F a line\n"), 1)
	f.Add([]byte("2026-01-02T03:04:05Z stderr P a piece\n2026-01-02T03:04:05Z stderr P:x more\nno record\n"), -1)
	f.Add([]byte(strings.Repeat("x", maxRecord+1)), 0)
	f.Add([]byte("\n\n   \n2026 stdout F x"), 3)
	f.Fuzz(func(t *testing.T, log []byte, tail int) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "0.log"), log, 0o600); err != nil {
			t.Fatal(err)
		}

		var out bytes.Buffer
		rd := &reader{
			cfg:   readConfig{Tail: tail},
			log:   target{Directory: dir, Path: "0.log"},
			out:   &out,
			flush: func() error { return nil },
		}
		defer rd.close()

		checkAllocations(t, 16*len(log), func() {
			if rd.prepare(t.Context()) == nil {
				_ = rd.copy(t.Context())
			}
		})

		checkFrames(t, &out, 4*len(log)+64)
	})
}

// checkFrames expects complete frames only, of limit bytes in total.
func checkFrames(t *testing.T, out io.Reader, limit int) {
	t.Helper()
	total := 0
	for head := make([]byte, prefixSize); ; {
		if _, err := io.ReadFull(out, head); err == io.EOF {
			return
		} else if err != nil {
			t.Fatal(err)
		}

		body := make([]byte, binary.BigEndian.Uint32(head))
		if _, err := io.ReadFull(out, body); err != nil {
			t.Fatal(err)
		}

		if _, err := decode(body); err != nil {
			t.Errorf("frame %q: %v", body, err)
		}

		if total += len(body); total > limit {
			t.Fatalf("the output exceeds %d bytes", limit)
		}
	}
}
