package driver

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestPathsOutOfTheDirectory(t *testing.T) {
	dir := t.TempDir()
	d, e := newDriver(t, dir)
	outside := filepath.Join(dir, "outside")
	pod := filepath.Join(dir, "pods/p")
	for _, err := range []error{
		os.MkdirAll(outside, 0o755),
		os.MkdirAll(pod, 0o755),
		os.Symlink(outside, filepath.Join(pod, "link")),
		os.Mkdir(filepath.Join(pod, "dir"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	before := len(openFiles(t))
	for _, log := range []target{
		{},
		{"relative", "0.log"},
		{"/", "0.log"},
		{pod, ""},
		{pod, "."},
		{pod, "../x"},
		{pod, "/etc/passwd"},
		{pod, "a/../../x"},
		{pod, "link/0.log"},
		{pod, "dir"},
		{filepath.Join(pod, "link"), "0.log"},
		{pod, "a\nb"},
		{pod, strings.Repeat("x", 256)},
		{pod, strings.Repeat("x/", 3000)},
		{filepath.Join(pod, "\x1b[2J"), "0.log"},
	} {
		c := e.container("x")
		c.log = log
		if err := e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": c.info()}); err == "" {
			t.Errorf("%+v was accepted", log)
		} else if strings.Contains(err, "panic") {
			t.Error(err)
		}

		c.fifo.Close()
		if err := os.Remove(c.FIFOPath); err != nil {
			t.Fatal(err)
		}
	}

	if files, _ := os.ReadDir(outside); len(files) > 0 {
		t.Errorf("files outside: %v", files)
	}

	checkTableIsEmpty(t, d)
	if after := openFiles(t); len(after) > before {
		t.Errorf("files still open: %v", after)
	}

	for _, body := range []string{"", "{", `{"File":"x"}`, `{"File":"/x","Info":{}}`} {
		t.Run(body, func(t *testing.T) {
			w := httptest.NewRecorder()
			r := httptest.NewRequest(http.MethodPost, "/LogDriver.StartLogging", strings.NewReader(body))
			e.http.ServeHTTP(w, r)
			if !strings.Contains(w.Body.String(), `"Err":"`) || strings.Contains(w.Body.String(), `"Err":""`) {
				t.Errorf("request %q: response %s, want an error", body, w.Body)
			}
		})
	}
}

// openFiles returns the process's open files without sockets, because sockets may belong to other
// tests.
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

func TestClient(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	socket := filepath.Join(t.TempDir(), "s.sock")
	client := NewClient(socket)
	if _, _, err := client.Watch(t.Context(), nil); !errdefs.IsUnavailable(err) {
		t.Errorf("Watch without a process: error %v, want Unavailable", err)
	}

	if err := client.Reopen(t.Context(), idOf("aa")); !errdefs.IsUnavailable(err) {
		t.Errorf("Reopen without a process: error %v, want Unavailable", err)
	}

	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	server := &http.Server{Handler: d.Handler()}
	go func() { _ = server.Serve(l) }()
	changes := make(chan Status, 10)
	s, ended, err := client.Watch(t.Context(), func(s Status) { changes <- s })
	if err != nil || s.Control != controlVersion || s.Version != "test" || s.PID != os.Getpid() {
		t.Fatalf("status %+v, error %v", s, err)
	}

	if err := client.Reopen(t.Context(), idOf("aa")); !errdefs.IsNotFound(err) {
		t.Errorf("Reopen of an unknown container: error %v, want NotFound", err)
	}

	d.alarms.raise(alarmTable)
	if s := <-changes; len(s.Alarms) != 1 {
		t.Errorf("status with an alarm: %+v", s)
	}

	d.alarms.lower(alarmTable)
	if s := <-changes; len(s.Alarms) != 0 || s.PID != os.Getpid() {
		t.Errorf("status without an alarm: %+v", s)
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

	if isClosed(ended) {
		t.Error("ended is closed while the process serves")
	}

	server.Close()
	<-ended
	c.stop()
}

func TestPluginProtocol(t *testing.T) {
	_, e := newDriver(t, t.TempDir())
	for path, want := range map[string]string{
		"/Plugin.Activate":        `{"Implements":["LogDriver"]}`,
		"/LogDriver.Capabilities": `{"Cap":{"ReadLogs":true}}`,
	} {
		t.Run(path, func(t *testing.T) {
			w := httptest.NewRecorder()
			e.http.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, nil))
			if got := strings.TrimSpace(w.Body.String()); got != want {
				t.Errorf("%s: response %s, want %s", path, got, want)
			}
		})
	}

	w := httptest.NewRecorder()
	e.http.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, m := range []string{"cri_dockerd_log_lines_total 0",
		`cri_dockerd_log_dropped_lines_total{reason="stalled"} 0`, "cri_dockerd_log_streams 0"} {
		if !slices.Contains(strings.Split(w.Body.String(), "\n"), m) {
			t.Errorf("missing %s in\n%s", m, w.Body)
		}
	}
}
