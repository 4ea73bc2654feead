package probe

import (
	"context"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/proc"
)

// serve serves an engine on a socket that responds to every request after a delay. The result of
// GET /info is empty.
func serve(t *testing.T, delay time.Duration) (endpoint string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}

	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(delay):
			case <-r.Context().Done():
			}
			w.Header().Set("Api-Version", "1.47")
			w.Header().Set("Content-Type", "application/json")
			if strings.HasSuffix(r.URL.Path, "/info") {
				_, _ = w.Write([]byte(`{"ServerVersion":"27.0.1","OSType":"linux"}`))
			}
		})}
	go s.Serve(l) //nolint:errcheck // ends with the test
	t.Cleanup(func() { s.Close() })

	return "unix://" + path
}

// TestSlowEngine checks that an engine that responds after the timeout is slow, with all its facts,
// and one that does not respond within the limit is silent.
func TestSlowEngine(t *testing.T) {
	tests := map[string]struct {
		delay   time.Duration // of each of the two requests
		timeout time.Duration
		limit   time.Duration
		problem finding.Problem
		isSlow  bool
	}{
		"fast":   {0, time.Minute, 2 * time.Minute, "", false},
		"slow":   {300 * time.Millisecond, 100 * time.Millisecond, time.Minute, "", true},
		"silent": {time.Minute, 100 * time.Millisecond, 500 * time.Millisecond, finding.Silent, true},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := tree(t, nil)
			p.timeout = test.timeout
			ctx, cancel := context.WithTimeout(t.Context(), test.limit)
			defer cancel()

			e := p.engine(ctx, &config.Config{DockerEndpoint: serve(t, test.delay)})
			if e.Problem != test.problem || e.Slow > 0 != test.isSlow || e.Stopped != 0 {
				t.Errorf("problem %q, %s, slow %s, stopped %d", e.Problem, e.Error, e.Slow, e.Stopped)
			}
			if test.problem == "" && e.Version != "27.0.1" {
				t.Errorf("version %q", e.Version)
			}
		})
	}
}

// TestStoppedService checks that the wait for a service with a stopped process ends after the
// timeout, and that the process is reported for a silent service only.
func TestStoppedService(t *testing.T) {
	sleep := exec.CommandContext(t.Context(), "sleep", "1000")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { _ = sleep.Wait() }) // the end of ctx has killed it
	p := New(50 * time.Millisecond)
	wait := func(limit time.Duration) (took time.Duration, w *stopwatch) {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()

		calls, w := p.measure(ctx, func() []proc.Process {
			x, err := p.proc.Process(sleep.Process.Pid)
			if err != nil {
				return nil
			}
			return []proc.Process{x}
		})
		defer w.end()

		w.call(func() { <-calls.Done() })

		return time.Since(begin), w
	}

	if took, w := wait(400 * time.Millisecond); took < 400*time.Millisecond || w.stopped(finding.Silent) != 0 {
		t.Errorf("running: the wait ended after %s, stopped process %d", took, w.stopped(finding.Silent))
	}

	if err := sleep.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}

	if took, w := wait(time.Minute); took > 30*time.Second || w.stopped(finding.Silent) != sleep.Process.Pid ||
		w.stopped("") != 0 || w.slow() == 0 {
		t.Errorf("stopped: the wait ended after %s, stopped process %d", took, w.stopped(finding.Silent))
	}
}

func TestLoad(t *testing.T) {
	p := tree(t, map[string]string{
		"/proc/loadavg":         "2.50 1.00 0.50 3/800 17\n",
		"/proc/pressure/cpu":    "some avg10=81.20 avg60=1.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00\n",
		"/proc/pressure/memory": "some avg10=nan avg60=1.00\n",
		"/proc/pressure/io":     "full avg10=7.00 avg60=0.00\n",
	})

	got := p.load()
	if got.CPUs < 1 || got.Average != 2.5 || got.CPU != 81.2 || got.Memory != 0 || got.IO != 0 {
		t.Errorf("load %+v", got)
	}
}
