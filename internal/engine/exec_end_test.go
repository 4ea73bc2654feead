package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// everyCgroup is used as a container ID. It matches every line of /proc/PID/cgroup.
const everyCgroup = model.ContainerID(":")

// slowServer is an engine with one exec and blocking requests.
type slowServer struct {
	create, start, inspect chan struct{} // a request blocks until its channel is closed; nil: never
	output                 []byte        // of the command

	mu       sync.Mutex     // guards the fields below
	state    string         // of the exec, in JSON
	requests map[string]int // by the last path element
	created  struct {
		DetachKeys string
		Tty        bool
	}
	started struct{ ConsoleSize []uint }
}

func (s *slowServer) set(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

// isStarted reports whether the engine has received the start request.
func (s *slowServer) isStarted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests["start"] > 0
}

// waitForStart waits for the start request, or for the end of ctx.
func (s *slowServer) waitForStart(ctx context.Context) {
	for ctx.Err() == nil && !s.isStarted() {
		time.Sleep(time.Millisecond)
	}
}

// ServeHTTP implements http.Handler.
func (s *slowServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	step := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	s.mu.Lock()
	if s.requests == nil {
		s.requests = map[string]int{}
	}

	s.requests[step]++
	state := s.state
	s.mu.Unlock()

	w.Header().Set("Api-Version", "1.45")
	switch step {
	case "exec":
		s.wait(s.create)
		s.decode(body, &s.created)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"Id":"%s"}`, idB)

	case "start":
		s.wait(s.start)
		s.decode(body, &s.started)
		s.serveOutput(w)

	case "json":
		s.wait(s.inspect)
		fmt.Fprintf(w, `{"ID":"%s",%s}`, idB, state)
	}
}

func (s *slowServer) wait(c chan struct{}) {
	if c != nil {
		<-c
	}
}

func (s *slowServer) decode(body []byte, into any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = json.Unmarshal(body, into)
}

func (s *slowServer) serveOutput(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()

	fmt.Fprint(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	_, _ = conn.Write(s.output)
	if c, ok := conn.(*net.UnixConn); ok && s.output == nil {
		_, _ = io.Copy(io.Discard, c) // until the client disconnects
	}
}

// execEngine returns an Engine with short timeouts, connected to s.
func execEngine(t *testing.T, s *slowServer) *Engine {
	e := engineOf(t, s)
	e.execs = execTimeouts{
		setup: 300 * time.Millisecond,
		size:  10 * time.Second,
		poll:  10 * time.Millisecond,
		drop:  10 * time.Second,
		reply: 10 * time.Millisecond,
		reap:  time.Minute,
	}

	return e
}

// sleeper starts a process in place of the command of an exec.
func sleeper(t *testing.T) (pid int, ended <-chan error) {
	t.Helper()
	handled := make(chan os.Signal, 1)
	// The child would inherit an ignored signal (execve(2)).
	signal.Notify(handled, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(handled) })
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	return cmd.Process.Pid, done
}

func checkEndedBy(t *testing.T, ended <-chan error, want syscall.Signal) {
	t.Helper()
	select {
	case err := <-ended:
		exit := new(exec.ExitError)
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != want {
			t.Errorf("the command ended with %v, want signal %v", err, want)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("the command is still running after 20 s")
	}
}

const notStarted = `"Running":false,"Pid":0,"ExitCode":null`

// TestLateStartIsKilled checks that a command started by the engine after the end of its call is
// killed.
func TestLateStartIsKilled(t *testing.T) {
	for name, block := range map[string]func(s *slowServer){
		"late response to the start": func(s *slowServer) { s.start = make(chan struct{}) },
		"late start of the command":  func(*slowServer) {},
		"late response to inspects": func(s *slowServer) {
			s.start, s.inspect = make(chan struct{}), make(chan struct{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &slowServer{state: notStarted}
			block(s)
			e := execEngine(t, s)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)

			go func() {
				s.waitForStart(ctx)
				cancel(context.DeadlineExceeded)
			}()

			_, err := e.Exec(ctx, everyCgroup, Exec{Cmd: []string{"sleep"}})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Exec: error %v, want DeadlineExceeded", err)
			}

			pid, ended := sleeper(t)
			s.set(fmt.Sprintf(`"Running":true,"Pid":%d,"ExitCode":null`, pid))
			for _, c := range []chan struct{}{s.start, s.inspect} {
				if c != nil {
					close(c)
				}
			}

			checkEndedBy(t, ended, syscall.SIGKILL)
		})
	}
}

// TestSetupTimeout checks that a call without a timeout ends if the engine does not respond.
func TestSetupTimeout(t *testing.T) {
	for name, s := range map[string]*slowServer{
		"create": {create: make(chan struct{}), state: notStarted},
		"start":  {start: make(chan struct{}), state: notStarted},
		"run":    {state: `"Running":true,"Pid":0,"ExitCode":null`},
	} {
		t.Run(name, func(t *testing.T) {
			e := execEngine(t, s)
			_, err := e.Exec(t.Context(), everyCgroup, Exec{Cmd: []string{"true"}})
			if !errdefs.IsUnavailable(err) || !errors.Is(err, errSetupTimeout) {
				t.Errorf("Exec: error %v, want Unavailable", err)
			}

			for _, c := range []chan struct{}{s.create, s.start} {
				if c != nil {
					close(c)
				}
			}
		})
	}
}

// TestClientDisconnected checks that a command continues after its client has disconnected, but a
// command with a terminal is hung up.
func TestClientDisconnected(t *testing.T) {
	for name, c := range map[string]struct {
		tty  bool
		want syscall.Signal
	}{
		"terminal":    {true, syscall.SIGHUP},
		"no terminal": {false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			pid, ended := sleeper(t)
			s := &slowServer{state: fmt.Sprintf(`"Running":true,"Pid":%d,"ExitCode":null`, pid)}
			e := execEngine(t, s)
			ctx, disconnect := context.WithCancelCause(t.Context())
			go func() {
				s.waitForStart(ctx)
				disconnect(ErrClientDisconnected)
			}()

			_, err := e.Exec(ctx, everyCgroup, Exec{Cmd: []string{"sh"}, Streams: Streams{TTY: c.tty}})
			if !errors.Is(err, ErrClientDisconnected) {
				t.Errorf("Exec: error %v, want ErrClientDisconnected", err)
			}

			if c.want != 0 {
				checkEndedBy(t, ended, c.want)
				return
			}

			e.Close() // waits for background work
			if err := syscall.Kill(pid, 0); err != nil {
				t.Errorf("the command has ended: %v", err)
			}
		})
	}
}

// TestExecTerminal checks that a command has the size of its terminal from the beginning, and that
// the detach keys are unlikely.
func TestExecTerminal(t *testing.T) {
	s := &slowServer{state: `"Running":false,"Pid":7,"ExitCode":0`, output: []byte("$ ")}
	e := execEngine(t, s)
	sizes := make(chan Size, 1)
	sizes <- Size{Width: 101, Height: 33}
	x := Exec{Cmd: []string{"sh"}, Streams: Streams{TTY: true, Stdin: strings.NewReader("x"), Resize: sizes}}
	if _, err := e.Exec(t.Context(), everyCgroup, x); err != nil {
		t.Fatal(err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()

	if got := fmt.Sprint(s.started.ConsoleSize); got != "[33 101]" {
		t.Errorf("size at the start is %s, want [33 101]", got)
	}

	if keys := strings.Split(s.created.DetachKeys, ","); !s.created.Tty || len(keys) < detachKeys ||
		keys[0] != "ctrl-@" {
		t.Errorf("detach keys %q", s.created.DetachKeys)
	}
}

// message returns a message of the engine for stdout.
func message(text string) []byte {
	n := len(text)
	return append([]byte{1, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, text...)
}

// blockingWriter blocks until it is released.
type blockingWriter struct {
	bytes.Buffer
	release chan struct{}
}

func (b *blockingWriter) Write(p []byte) (int, error) {
	<-b.release
	return b.Buffer.Write(p)
}

// TestIncompleteOutput checks that OnExit is called in time for a blocking writer, and that lost
// output is an error.
func TestIncompleteOutput(t *testing.T) {
	exited := `"Running":false,"Pid":7,"ExitCode":0`
	t.Run("in time", func(t *testing.T) {
		e := execEngine(t, &slowServer{state: exited, output: message("output")})
		out := &blockingWriter{release: make(chan struct{})}
		var once sync.Once
		_, err := e.Exec(t.Context(), everyCgroup, Exec{
			Cmd:     []string{"x"},
			Streams: Streams{Stdout: out},
			OnExit:  func() { once.Do(func() { close(out.release) }) },
		})
		if err != nil || out.String() != "output" {
			t.Errorf("output %q, error %v", out.String(), err)
		}
	})

	t.Run("too late", func(t *testing.T) {
		e := execEngine(t, &slowServer{state: exited, output: message("output")})
		e.execs.poll, e.execs.drop = time.Hour, time.Millisecond
		out := &blockingWriter{release: make(chan struct{})}
		time.AfterFunc(50*time.Millisecond, func() { close(out.release) })

		_, err := e.Exec(t.Context(), everyCgroup, Exec{Cmd: []string{"x"}, Streams: Streams{Stdout: out}})
		if !errors.Is(err, errIncomplete) {
			t.Errorf("error %v, want errIncomplete", err)
		}
	})

	t.Run("truncated", func(t *testing.T) {
		for _, n := range []int{3, 8, 12} { // inside the header, after it, inside the data
			e := execEngine(t, &slowServer{state: exited, output: message("output")[:n]})
			if _, err := e.Exec(t.Context(), everyCgroup, Exec{Cmd: []string{"x"}}); !errors.Is(err, errIncomplete) {
				t.Errorf("%d bytes: error %v, want errIncomplete", n, err)
			}
		}
	})
}

// TestReapsAreBounded checks the number of pending cancelled execs and the rate of inspects. close
// ends all of them.
func TestReapsAreBounded(t *testing.T) {
	var r reaps
	wait := func(ctx context.Context) { <-ctx.Done() }
	for i := range maxReaps {
		if err := r.start(t.Context(), time.Hour, wait); err != nil {
			t.Fatalf("reap %d: %v", i, err)
		}
	}

	if err := r.start(t.Context(), time.Hour, wait); err == nil {
		t.Error("start returned no error beyond the limit")
	}

	if rate := maxReaps / r.interval().Seconds(); rate > reapBatch/reapInterval.Seconds() {
		t.Errorf("%.0f inspects per second, want at most %.0f", rate, reapBatch/reapInterval.Seconds())
	}

	r.close()
	if r.count != 0 {
		t.Errorf("%d goroutines remain after close", r.count)
	}
}
