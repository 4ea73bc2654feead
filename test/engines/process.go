package engines

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

// Begin starts dockerd without waiting for it.
func (e *Engine) Begin(tb TB) {
	tb.Helper()
	args := []string{
		"-H", "unix://" + e.Socket, "--data-root", e.DataRoot(), "--exec-root", "/run/docker", "--pidfile",
		"/run/docker.pid",
		"--cgroup-parent", e.CgroupParent, "--add-runtime", "wrapped=" + filepath.Join(e.Dir, "runc-wrapper"),
		"--default-runtime", "wrapped",
		"--live-restore", "--userland-proxy=false", "--exec-opt", "native.cgroupdriver=cgroupfs",
	}

	e.docker = e.background(tb, "docker", "dockerd", append(args, e.flags...)...)
}

// startDocker starts dockerd in the namespaces and waits for its first response.
func (e *Engine) startDocker(tb TB) {
	tb.Helper()
	e.Begin(tb)
	ready := func() bool {
		c, err := client.New(client.WithHost("unix://" + e.Socket))
		if err != nil {
			return false
		}
		defer c.Close()

		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()

		_, err = c.Info(ctx, client.InfoOptions{})

		return err == nil
	}
	if !Within(startDeadline, ready) {
		tail(tb, filepath.Join(e.Dir, "docker.log"), 30)
		tb.Fatalf("engine %s is not responding", e.Version)
	}
}

// background starts a program in the namespaces with its output in <name>.log and its PID, inside
// the namespaces, in <name>.pid.
func (e *Engine) background(tb TB, name, program string, args ...string) *exec.Cmd {
	tb.Helper()
	script := fmt.Sprintf(`echo $$ > %s/%s.pid; exec "$@" >> %s/%s.log 2>&1`, e.Dir, name, e.Dir, name)
	cmd := e.Command("sh", append([]string{"-c", script, "sh", program}, args...)...)
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start %s: %v", program, err)
	}

	go func() { _ = cmd.Wait() }()

	return cmd
}

// Background starts a program in the namespaces. Its output goes to <name>.log in Dir. It ends with
// the engine.
func (e *Engine) Background(tb TB, name, program string, args ...string) {
	tb.Helper()
	e.background(tb, name, program, args...)
}

// KillBackground kills a program of Background with SIGKILL.
func (e *Engine) KillBackground(tb TB, name string) {
	tb.Helper()
	e.signal(tb, name, "KILL")
}

// signal sends a signal to a program. For KILL, it waits for the end of the process.
func (e *Engine) signal(tb TB, name, signal string) {
	tb.Helper()
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	if err != nil {
		tb.Fatalf("%s: %v", name, err)
	}

	p := strings.TrimSpace(string(pid))
	if out, err := e.Command("kill", "-"+signal, p).CombinedOutput(); err != nil {
		tb.Logf("kill %s: %v %s", name, err, out)
	}

	ended := func() bool { return e.Command("test", "-e", "/proc/"+p).Run() != nil }
	if !Within(20*time.Second, ended) {
		tb.Fatalf("%s does not end on %s", name, signal)
	}
}

// Running reports whether dockerd is running, paused or not.
func (e *Engine) Running() bool { return e.runs("docker") }

// runs reports whether a program of background is running.
func (e *Engine) runs(name string) bool {
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	if err != nil || len(bytes.TrimSpace(pid)) == 0 {
		return true // it is about to start
	}
	_, err = os.Stat(e.Path("/proc/" + strings.TrimSpace(string(pid))))
	return err == nil
}

// Started reports whether the last started dockerd has its process.
func (e *Engine) Started() bool { return e.started("docker") }

func (e *Engine) started(name string) bool {
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	return err == nil && bytes.HasSuffix(pid, []byte("\n"))
}

// Clear removes the leftovers of a killed dockerd, so that another can start.
func (e *Engine) Clear(tb TB) {
	tb.Helper()
	_ = os.Remove(e.Socket)
	_ = os.Remove(filepath.Join(e.Dir, "docker.pid"))
	if out, err := e.Command("rm", "-f", "/run/docker.pid").CombinedOutput(); err != nil {
		tb.Logf("%v: %s", err, out)
	}
}

// Signal sends dockerd a signal without ending it: STOP or CONT.
func (e *Engine) Signal(tb TB, signal string) {
	tb.Helper()
	pid, err := os.ReadFile(filepath.Join(e.Dir, "docker.pid"))
	if err != nil {
		tb.Fatalf("docker: %v", err)
	}

	if out, err := e.Command("kill", "-"+signal, strings.TrimSpace(string(pid))).CombinedOutput(); err != nil {
		tb.Fatalf("kill -%s dockerd: %v\n%s", signal, err, out)
	}

	if signal == "CONT" { // nsenter(1) has stopped itself with its child dockerd
		if err := e.docker.Process.Signal(syscall.SIGCONT); err != nil {
			tb.Fatalf("continue nsenter: %v", err)
		}
	}
}

// CPU returns the CPU time of dockerd and its containerd, of all threads together (schedstat,
// Documentation/scheduler/sched-stats.rst).
func (e *Engine) CPU(tb TB) time.Duration {
	tb.Helper()
	script := `d=$(cat ` + e.Dir + `/docker.pid)
		for p in $d $(cat /proc/$d/task/*/children); do
			[ "$(cat /proc/$p/comm)" = dockerd ] || [ "$(cat /proc/$p/comm)" = containerd ] || continue
			cat /proc/$p/task/*/schedstat
		done`

	out, err := e.Command("sh", "-c", script).Output()
	sum, parseErr := sumSchedstat(string(out))
	if err != nil || parseErr != nil || sum == 0 {
		tb.Fatalf("CPU of the engine: %q, %v, %v", out, err, parseErr)
	}

	return sum
}

// sumSchedstat adds up the first column, nanoseconds on a processor.
func sumSchedstat(lines string) (sum time.Duration, err error) {
	for line := range strings.Lines(lines) {
		ran, _, _ := strings.Cut(line, " ")
		ns, err := strconv.ParseInt(ran, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%q: %w", line, err)
		}
		sum += time.Duration(ns)
	}

	return sum, nil
}

// Kill kills dockerd with SIGKILL. Its containers keep running (live-restore).
func (e *Engine) Kill(tb TB) {
	tb.Helper()
	e.signal(tb, "docker", "KILL")
}

// Stop stops dockerd gracefully. Its containers keep running (live-restore).
func (e *Engine) Stop(tb TB) {
	tb.Helper()
	e.signal(tb, "docker", "TERM")
}

// Restart starts dockerd after Kill or Stop.
func (e *Engine) Restart(tb TB) {
	tb.Helper()
	e.Clear(tb)
	e.startDocker(tb)
}
