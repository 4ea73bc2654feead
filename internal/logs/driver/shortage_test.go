package driver

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"cri-dockerd/internal/text"
)

// withoutDescriptors prevents this process from opening files until lift is called.
func withoutDescriptors(t *testing.T) (lift func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}

	// The lowest free descriptor becomes the limit.
	free, err := syscall.Dup(0)
	if err != nil {
		t.Fatal(err)
	}

	syscall.Close(free)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(free), Max: old.Max}); err != nil {
		t.Fatal(err)
	}

	lift = func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old) }
	t.Cleanup(lift)

	return lift
}

// TestDescriptorsExhausted expects existing streams to continue, even with more streams than
// buffers. A new one must fail with a retryable error. The alarm must be raised and cleared.
func TestDescriptorsExhausted(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	const streams = 3 * maxIdleScratch
	var all []*container
	for i := range streams {
		c := e.container(strconv.Itoa(i))
		c.start()
		all = append(all, c)
	}

	late := e.container("late")

	lift := withoutDescriptors(t)
	for i := range 50 {
		for _, c := range all {
			c.print(fmt.Sprint("line ", i))
		}
	}

	eventually(t, "all lines are written", func() bool { return testutil.ToFloat64(d.metrics.lines) == 50*streams })
	err := e.call("/LogDriver.StartLogging", map[string]any{"File": late.FIFOPath, "Info": late.info()})
	if !strings.Contains(err, "too many open files") {
		t.Errorf("StartLogging: %q", err)
	}

	if alarms := d.alarms.list(); !slices.Equal(alarms, []string{alarmText[alarmDescriptors]}) {
		t.Errorf("alarms: %q", alarms)
	}
	if n := d.droppedLines(reasonDisk); n != 0 {
		t.Errorf("%v lines were dropped", n)
	}

	lift()
	eventually(t, "the alarm is cleared", func() bool { return len(d.alarms.list()) == 0 })
	late.start()
	late.print("at last")
	late.stop()
	if diff := cmp.Diff([]string{"stdout F at last"}, texts(t, late.log.String())); diff != "" {
		t.Error(diff)
	}

	for _, c := range all {
		c.stop()
		if n := len(texts(t, c.log.String())); n != 50 {
			t.Errorf("%d lines, want 50", n)
		}
	}
}

// TestLogWaitsForDescriptors expects output to wait rather than to be dropped while there is no
// descriptor for the log.
func TestLogWaitsForDescriptors(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	c.start()
	s := c.stream(d)
	s.lock()
	s.log.Close()
	s.log = nil
	s.checked = s.opened.AddDate(-1, 0, 0)
	lift := withoutDescriptors(t)
	s.unlock()
	c.print("one", "two")
	eventually(t, "the alarm is raised", func() bool { return len(d.alarms.list()) == 1 })
	lift()
	eventually(t, "both are written", func() bool { return testutil.ToFloat64(d.metrics.lines) == 2 })
	c.stop()

	if diff := cmp.Diff([]string{"stdout F one", "stdout F two"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

// exhausted is a listener without descriptors for its first connections.
type exhausted struct {
	net.Listener
	fails atomic.Int32
}

func (l *exhausted) Accept() (net.Conn, error) {
	if l.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// TestAcceptWithoutDescriptors expects the server neither to end nor to spin, and the alarm to be
// raised.
func TestAcceptWithoutDescriptors(t *testing.T) {
	d, _ := newDriver(t, t.TempDir())
	socket := filepath.Join(t.TempDir(), "s.sock")
	inner, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	l := &exhausted{Listener: inner}
	l.fails.Store(5)
	server := &http.Server{Handler: d.Handler(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	ended := make(chan error)
	go func() { ended <- server.Serve(d.Listener(l)) }()
	eventually(t, "the alarm is raised", func() bool { return len(d.alarms.list()) == 1 })
	families, err := NewClient(socket).Metrics(t.Context())
	if err != nil || families["cri_dockerd_log_streams"] == nil {
		t.Errorf("metrics %v, error %v", families, err)
	}

	if n := l.fails.Load(); n < -3 {
		t.Errorf("%d more connections were accepted", -n)
	}

	server.Close()
	<-ended
}

// TestLargeRequest expects a body beyond the limit to be refused with the reason.
func TestLargeRequest(t *testing.T) {
	d, e := newDriver(t, t.TempDir())
	c := e.container("aa")
	info := c.info()
	info["ContainerLabels"] = map[string]string{"x": strings.Repeat("y", maxRequest)}
	err := e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": info})
	if !strings.Contains(err, "labels and the environment") {
		t.Errorf("StartLogging: %q", err)
	}

	if c.stream(d) != nil {
		t.Error("the container was started")
	}

	info["ContainerLabels"] = map[string]string{"x": strings.Repeat("y", maxRequest/2)}
	if err := e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": info}); err != "" {
		t.Errorf("StartLogging: %q", err)
	}

	c.stop()
}

// TestForeignText expects foreign text in responses and logs to be bounded and free of control
// characters.
func TestForeignText(t *testing.T) {
	_, e := newDriver(t, t.TempDir(), func(c *Config) { c.Log = slog.New(slog.NewTextHandler(io.Discard, nil)) })
	c := e.container("aa")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	long := file + strings.Repeat("/"+strings.Repeat("x", 200), 19)
	long += "/" + strings.Repeat("x", maxPath-len(long)-3)
	evil := "\x1b[2J" + strings.Repeat("x", 100_000)
	for _, change := range []func(file *string, info map[string]any){
		func(file *string, _ map[string]any) { *file = evil },
		func(_ *string, info map[string]any) { info["ContainerID"] = evil },
		func(_ *string, info map[string]any) { info["Config"] = map[string]string{OptionDirectory: evil} },
		func(_ *string, info map[string]any) {
			info["Config"] = map[string]string{OptionDirectory: "/x", OptionPath: evil}
		},
		func(_ *string, info map[string]any) {
			info["Config"] = map[string]string{OptionDirectory: long, OptionPath: "x"}
		},
	} {
		file, info := c.FIFOPath, c.info()
		change(&file, info)
		err := e.call("/LogDriver.StartLogging", map[string]any{"File": file, "Info": info})
		if err == "" || len(err) > text.MaxMessage || strings.ContainsRune(err, 0x1b) {
			t.Errorf("the response has %d bytes: %.100q", len(err), err)
		}
	}
}
