package nodes

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"cri-dockerd/test/engines"
)

// guard is a running guard of a node or network.
type guard struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

// hold starts a guard and returns it with its reported PID. The guard runs in its own session, to
// complete its cleanup after an interrupt. At the end of the test, hold closes the guard's standard
// input to stop it.
func hold(tb engines.TB, cmd *exec.Cmd) (g *guard, pid string) {
	tb.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	out, in, err := os.Pipe()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	cmd.Stdout = in
	err = cmd.Start()
	in.Close()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	g = &guard{cmd: cmd, stdin: stdin, out: bufio.NewReader(out)}
	tb.Cleanup(func() { g.stop(tb); out.Close() })
	if pid, err = g.readPID(); err != nil {
		tb.Fatalf("node: %v; the test requires root", err)
	}

	return g, pid
}

// readPID reads the PID of a new node or network.
func (g *guard) readPID() (string, error) {
	line, err := g.out.ReadString('\n')
	pid, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
	if err != nil || !ok {
		return "", fmt.Errorf("create the namespaces (%q): %w", line, err)
	}
	return pid, nil
}

// start starts the node again and returns the PID of its process 1.
func (g *guard) start() (string, error) {
	if _, err := io.WriteString(g.stdin, "start\n"); err != nil {
		return "", err
	}
	return g.readPID()
}

// stop stops a guard.
func (g *guard) stop(tb engines.TB) {
	g.stdin.Close()
	if err := g.cmd.Wait(); err != nil {
		tb.Logf("stop a node or network: %v", err)
	}
}
