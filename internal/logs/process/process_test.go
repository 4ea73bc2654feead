package process

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/logs/driver"
)

// socketVariable is the environment variable with the socket of a test's log-driver process. The
// real path is fixed.
const socketVariable = "LOG_DRIVER_TEST_SOCKET"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Command {
		if err := logDriverMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}

	goleak.VerifyTestMain(m)
}

// logDriverMain runs this program as the log-driver process, as started by Launch.
func logDriverMain() error {
	f := flag.NewFlagSet("test", flag.ContinueOnError)
	dir := f.String("run-directory", "", "")
	if err := f.Parse(os.Args[2:]); err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()

	return Run(ctx, Config{
		RunDirectory: *dir,
		Socket:       os.Getenv(socketVariable),
		Version:      "test",
		Log:          slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
}

// watch waits for the process behind a socket.
func watch(t *testing.T, socket string) (s driver.Status, ended <-chan struct{}) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		s, ended, err := driver.NewClient(socket).Watch(t.Context(), nil)
		if err == nil {
			return s, ended
		}

		if time.Now().After(deadline) {
			t.Fatalf("the process does not respond: %v", err)
		}

		time.Sleep(5 * time.Millisecond)
	}
}

func TestLaunchedLogDriver(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "plugins", "cri-dockerd.sock")
	t.Setenv(socketVariable, socket)
	ended, err := Launch(dir)
	if err != nil {
		t.Fatal(err)
	}

	s, disconnected := watch(t, socket)
	if sid, err := unix.Getsid(s.PID); err != nil || sid != s.PID {
		t.Errorf("the process is in session %d (%v), want its own", sid, err)
	}

	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v (%v), want 0600", st.Mode(), err)
	}

	second, err := Launch(dir)
	if err != nil {
		t.Fatal(err)
	}

	if err := <-second; err == nil || !strings.Contains(err.Error(), "another cri-dockerd is using it") {
		t.Errorf("a second process ended with %v, want an error of the lock", err)
	}

	if err := syscall.Kill(s.PID, syscall.SIGHUP); err != nil { // a closed terminal
		t.Fatal(err)
	}

	if again, _ := watch(t, socket); again.PID != s.PID {
		t.Errorf("process %d was replaced by %d", s.PID, again.PID)
	}
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}

	<-disconnected
	<-ended
	ended, err = Launch(dir) // over the socket of the killed process
	if err != nil {
		t.Fatal(err)
	}

	next, disconnected := watch(t, socket)
	if next.PID == s.PID {
		t.Error("the killed process responds")
	}
	if err := syscall.Kill(next.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}

	<-disconnected
	<-ended
}

func TestLogDriverCannotListen(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	t.Setenv(socketVariable, filepath.Join(file, "cri-dockerd.sock"))
	ended, err := Launch(dir)
	if err != nil {
		t.Fatal(err)
	}

	if err := <-ended; err == nil || !strings.Contains(err.Error(), "exit status 1") ||
		!strings.Contains(err.Error(), "not a directory") {
		t.Errorf("last line of output: %v", err)
	}
}

// TestLogDriverKeepsSystemdsSocket expects a launched process not to replace the socket of a slow
// systemd process.
func TestLogDriverKeepsSystemdsSocket(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "systemd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	before, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}

	t.Setenv(socketVariable, socket)
	ended, err := Launch(dir)
	if err != nil {
		t.Fatal(err)
	}

	if err := <-ended; err == nil || !strings.Contains(err.Error(), "systemd holds "+socket) {
		t.Errorf("last line of output: %v", err)
	}

	if after, err := os.Stat(socket); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket was replaced: %v", err)
	}
}

// TestLogDriverOnSystemdsSocket passes a socket as systemd does (sd_listen_fds(3)), and expects a
// notification when the process is ready.
func TestLogDriverOnSystemdsSocket(t *testing.T) {
	dir, notified := t.TempDir(), systemd(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "passed.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}

	t.Setenv(socketVariable, filepath.Join(dir, "launched.sock"))
	launched, err := Launch(dir) // while systemd's socket was missing
	if err != nil {
		t.Fatal(err)
	}

	watch(t, filepath.Join(dir, "launched.sock"))
	// The shell sets LISTEN_PID, because only the process itself knows its PID.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, self, Command, "--run-directory="+dir)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	if err := notified.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}

	b := make([]byte, 100)
	if n, err := notified.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Fatalf("systemd got %q, %v", b[:n], err)
	}

	<-launched // it releases the lock
	s, disconnected := watch(t, filepath.Join(dir, "passed.sock"))
	if s.PID != cmd.Process.Pid || s.Control != 1 {
		t.Errorf("status %+v", s)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}

	<-disconnected
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}

	if _, err := os.Lstat(filepath.Join(dir, "passed.sock")); err != nil {
		t.Errorf("systemd's socket was removed: %v", err)
	}

	if files, err := filepath.Glob(filepath.Join(dir, "log-driver/streams/*")); err != nil || len(files) > 0 {
		t.Errorf("the table still has files %v, %v", files, err)
	}
}

// systemd returns the receiving socket of sd_notify.
func systemd(t *testing.T) *net.UnixConn {
	t.Helper()
	file := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: file, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", file)

	return c
}

// TestStopLogDriver expects the log-driver process of root with the PID of the file to be stopped,
// and no other process with that PID.
func TestStopLogDriver(t *testing.T) {
	scripts, err := os.MkdirTemp("", "scripts")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scripts)

	if err := os.Chmod(scripts, 0o755); err != nil {
		t.Fatal(err)
	}

	for _, name := range []string{Command, "another"} {
		if err := os.WriteFile(filepath.Join(scripts, name), []byte("echo; read line"), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	for name, c := range map[string]struct {
		argument string
		uid      uint32
		ends     bool
	}{
		"the log-driver":         {Command, 0, true},
		"another program":        {"another", 0, false},
		"another user's process": {Command, 65534, false},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/bin/sh", c.argument) // runs the script of this name
			cmd.Dir = scripts
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}

			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}

			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}

			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}

			if err := stop(cmd.Process.Pid); (err == nil) != c.ends {
				t.Errorf("stop: error %v, want success %v", err, c.ends)
			}

			if !c.ends {
				in.Close()
			}

			err = cmd.Wait()
			if killed := cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled(); killed != c.ends {
				t.Errorf("ended by a signal: %v, %v", killed, err)
			}
			if err := stop(cmd.Process.Pid); err != nil {
				t.Errorf("stop after its end: %v", err)
			}
		})
	}
}
