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

// everyCgroup takes the place of a container's ID: each line of /proc/PID/cgroup has it.
const everyCgroup = model.ContainerID(":")

// slowServer is an engine with one exec, whose steps wait.
type slowServer struct {
	create, start, inspect chan struct{} // each step waits until it is closed; nil: at once
	output                 []byte        // what the command prints

	mu      sync.Mutex // guards the rest
	state   string     // of the exec, in JSON
	asked   map[string]int
	created struct {
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

// isStarted reports whether the engine was asked to start the command.
func (s *slowServer) isStarted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked["start"] > 0
}

// ServeHTTP implements http.Handler.
func (s *slowServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	step := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	s.mu.Lock()
	if s.asked == nil {
		s.asked = map[string]int{}
	}

	s.asked[step]++
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
		_, _ = io.Copy(io.Discard, c) // it goes on until the client leaves
	}
}

// execEngine is connected to s, with short timeouts.
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

// sleeper is a process that stands for the command of an exec.
func sleeper(t *testing.T) (pid int, ended <-chan error) {
	t.Helper()
	handled := make(chan os.Signal, 1)
	// a signal that is ignored here would be ignored there (execve(2))
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

func endedBy(t *testing.T, ended <-chan error, want syscall.Signal) {
	t.Helper()
	select {
	case err := <-ended:
		exit := new(exec.ExitError)
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != want {
			t.Errorf("the command ended with %v, want signal %v", err, want)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("the command runs on")
	}
}

const notStarted = `"Running":false,"Pid":0,"ExitCode":null`

// TestLateStartIsKilled: a command that the engine starts after its call has timed out is killed.
func TestLateStartIsKilled(t *testing.T) {
	for name, begin := range map[string]func(s *slowServer){
		"the request is answered late": func(s *slowServer) { s.start = make(chan struct{}) },
		"the command is started late":  func(*slowServer) {},
		"inspect hangs for a while too": func(s *slowServer) {
			s.start, s.inspect = make(chan struct{}), make(chan struct{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &slowServer{state: notStarted}
			begin(s)
			e := execEngine(t, s)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()

			if _, err := e.Exec(ctx, everyCgroup, Exec{Cmd: []string{"sleep"}}); !errors.Is(err,
				context.DeadlineExceeded) {
				t.Errorf("Exec: %v", err)
			}

			pid, ended := sleeper(t)
			s.set(fmt.Sprintf(`"Running":true,"Pid":%d,"ExitCode":null`, pid))
			for _, c := range []chan struct{}{s.start, s.inspect} {
				if c != nil {
					close(c)
				}
			}

			endedBy(t, ended, syscall.SIGKILL)
		})
	}
}

// TestSilentEngine: without a timeout of its own, a call ends when the engine does not take a step.
func TestSilentEngine(t *testing.T) {
	for name, s := range map[string]*slowServer{
		"create": {create: make(chan struct{}), state: notStarted},
		"start":  {start: make(chan struct{}), state: notStarted},
		"run":    {state: `"Running":true,"Pid":0,"ExitCode":null`},
	} {
		t.Run(name, func(t *testing.T) {
			e := execEngine(t, s)
			if _, err := e.Exec(t.Context(), everyCgroup, Exec{Cmd: []string{"true"}}); !errdefs.IsUnavailable(err) ||
				!errors.Is(err, errSilent) {
				t.Errorf("Exec: %v", err)
			}

			for _, c := range []chan struct{}{s.create, s.start} {
				if c != nil {
					close(c)
				}
			}
		})
	}
}

// TestClientGone: without its client a command goes on, but one with a terminal is hung up.
func TestClientGone(t *testing.T) {
	for name, c := range map[string]struct {
		tty  bool
		want syscall.Signal
	}{"terminal": {true, syscall.SIGHUP}, "no terminal": {false, 0}} {
		t.Run(name, func(t *testing.T) {
			pid, ended := sleeper(t)
			s := &slowServer{state: fmt.Sprintf(`"Running":true,"Pid":%d,"ExitCode":null`, pid)}
			e := execEngine(t, s)
			ctx, leave := context.WithCancelCause(t.Context())
			go func() {
				for ctx.Err() == nil && !s.isStarted() {
					time.Sleep(time.Millisecond)
				}
				leave(ErrClientGone)
			}()

			if _, err := e.Exec(ctx, everyCgroup,
				Exec{Cmd: []string{"sh"}, Streams: Streams{TTY: c.tty}}); !errors.Is(err, ErrClientGone) {
				t.Errorf("Exec: %v", err)
			}

			if c.want != 0 {
				endedBy(t, ended, c.want)
				return
			}

			e.Close() // nothing is left to be done
			if err := syscall.Kill(pid, 0); err != nil {
				t.Errorf("the command has ended: %v", err)
			}
		})
	}
}

// TestTerminalOfAnExec: the command knows the size of its terminal from the beginning, and the
// engine takes no key for the wish to detach.
func TestTerminalOfAnExec(t *testing.T) {
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
		t.Errorf("size at the start: %s", got)
	}

	if keys := strings.Split(s.created.DetachKeys, ","); !s.created.Tty || len(keys) < detachKeys ||
		keys[0] != "ctrl-@" {
		t.Errorf("detach keys %q", s.created.DetachKeys)
	}
}

// message is one of the engine's for stdout.
func message(text string) []byte {
	n := len(text)
	return append([]byte{1, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, text...)
}

// blocking is a writer that blocks until it is released.
type blocking struct {
	bytes.Buffer
	release chan struct{}
}

func (b *blocking) Write(p []byte) (int, error) {
	<-b.release
	return b.Buffer.Write(p)
}

// TestOutputIsCompleteOrAnError: a writer that blocks hears of the end of the command in time, and
// one that does not go on gets an error.
func TestOutputIsCompleteOrAnError(t *testing.T) {
	exited := `"Running":false,"Pid":7,"ExitCode":0`
	t.Run("in time", func(t *testing.T) {
		e := execEngine(t, &slowServer{state: exited, output: message("all of it")})
		out := &blocking{release: make(chan struct{})}
		var once sync.Once
		x := Exec{Cmd: []string{"x"}, Streams: Streams{Stdout: out}, Ended: func() {
			once.Do(func() { close(out.release) })
		}}
		if _, err := e.Exec(t.Context(), everyCgroup, x); err != nil || out.String() != "all of it" {
			t.Errorf("%q, %v", out.String(), err)
		}
	})

	t.Run("too late", func(t *testing.T) {
		e := execEngine(t, &slowServer{state: exited, output: message("all of it")})
		e.execs.poll, e.execs.drop = time.Hour, time.Millisecond
		out := &blocking{release: make(chan struct{})}
		time.AfterFunc(50*time.Millisecond, func() { close(out.release) })
		if _, err := e.Exec(t.Context(), everyCgroup,
			Exec{Cmd: []string{"x"}, Streams: Streams{Stdout: out}}); !errors.Is(err, errIncomplete) {
			t.Errorf("%v", err)
		}
	})

	t.Run("cut", func(t *testing.T) {
		for _, n := range []int{3, 8, 12} { // inside the header, after it, inside the data
			e := execEngine(t, &slowServer{state: exited, output: message("all of it")[:n]})
			if _, err := e.Exec(t.Context(), everyCgroup, Exec{Cmd: []string{"x"}}); !errors.Is(err, errIncomplete) {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
	})
}

// TestReapsAreBounded: however many commands were given up, the engine is asked for them at a
// bounded rate, and close ends them.
func TestReapsAreBounded(t *testing.T) {
	var r reaps
	wait := func(ctx context.Context) { <-ctx.Done() }
	for i := range maxReaps {
		if err := r.start(t.Context(), time.Hour, wait); err != nil {
			t.Fatalf("reap %d: %v", i, err)
		}
	}

	if err := r.start(t.Context(), time.Hour, wait); err == nil {
		t.Error("one more than the bound")
	}

	if rate := maxReaps / r.interval().Seconds(); rate > reapCrowd/reapInterval.Seconds() {
		t.Errorf("%.0f inspects a second", rate)
	}

	r.close()
	if r.count != 0 {
		t.Errorf("%d are left", r.count)
	}
}
