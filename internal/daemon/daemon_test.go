package daemon

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/config"
	"cri-dockerd/internal/process"
)

// TestMain ignores klog's own goroutine, which never ends.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

// configure returns a configuration with all paths below one directory and without an engine.
func configure(t *testing.T, dir string, args ...string) *config.Config {
	t.Helper()
	c, f := &config.Config{}, pflag.NewFlagSet("test", pflag.ContinueOnError)
	c.Register(f)
	args = append([]string{
		"--container-runtime-endpoint=unix://" + filepath.Join(dir, "cri.sock"),
		"--docker-endpoint=unix://" + filepath.Join(dir, "no-engine.sock"),
		"--cri-dockerd-root-directory=" + filepath.Join(dir, "root"),
		"--run-directory=" + filepath.Join(dir, "run"),
		"--cni-conf-dir=" + filepath.Join(dir, "net.d"),
		"--cni-cache-dir=" + filepath.Join(dir, "cache"),
		"--metrics-bind-address=unix://" + filepath.Join(dir, "metrics.sock"),
		// the other modes would start the test program as the log-driver process
		"--container-log=json-file",
	}, args...)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}

	c.Complete(f)
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}

	c.PinDirectory = filepath.Join(dir, "netns")
	t.Cleanup(func() { _ = syscall.Unmount(c.PinDirectory, syscall.MNT_DETACH) }) // shared bind mount of the daemon

	return c
}

// notifySocket returns a socket for notifications (sd_notify(3)).
func notifySocket(t *testing.T) *net.UnixConn {
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

// awaitState waits for a notification of systemd.
func awaitState(t *testing.T, c *net.UnixConn, want string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}

	for buf := make([]byte, 1024); ; {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("wait for notification %s: %v", want, err)
		}
		if got := string(buf[:n]); got == want || strings.HasPrefix(got, want+"\n") {
			return
		}
	}
}

// TestWithoutEngine starts the daemon without an engine. It must notify systemd, survive SIGHUP,
// send keep-alive messages and stop.
func TestWithoutEngine(t *testing.T) {
	for _, plugin := range []string{"cni", "kubenet", ""} {
		t.Run("network="+plugin, func(t *testing.T) {
			dir, notified := t.TempDir(), notifySocket(t)
			t.Setenv("WATCHDOG_USEC", "20000")
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				ended <- Run(ctx, configure(t, dir, "--network-plugin="+plugin, "--pod-cidr=10.88.0.0/24"), "test",
					slog.New(slog.DiscardHandler))
			}()

			awaitState(t, notified, "READY=1")
			awaitState(t, notified, "WATCHDOG=1")
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}

			awaitState(t, notified, "RELOADING=1")
			awaitState(t, notified, "READY=1")
			awaitState(t, notified, "WATCHDOG=1")
			c, err := net.Dial("unix", filepath.Join(dir, "cri.sock"))
			if err != nil {
				t.Error(err)
			} else {
				c.Close()
			}

			stop()
			if err := <-ended; err != nil {
				t.Errorf("Run: %v", err)
			}

			awaitState(t, notified, "STOPPING=1")
			if _, err := os.Lstat(filepath.Join(dir, "cri.sock")); !os.IsNotExist(err) {
				t.Errorf("the socket still exists: %v", err)
			}
		})
	}
}

// TestStopEndsEventStreams checks that an open event stream does not delay the stop of the daemon.
func TestStopEndsEventStreams(t *testing.T) {
	dir, notified := t.TempDir(), notifySocket(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Run(ctx, configure(t, dir, "--network-plugin="), "test", slog.New(slog.DiscardHandler))
	}()
	awaitState(t, notified, "READY=1")
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "cri.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	stream, err := runtimeapi.NewRuntimeServiceClient(conn).GetContainerEvents(t.Context(),
		&runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = stream.Header() // the daemon has started the stream
	}

	if err != nil {
		t.Fatal(err)
	}

	start := time.Now()
	stop()
	if _, err := stream.Recv(); grpcstatus.Code(err) != codes.Unavailable ||
		!strings.Contains(err.Error(), "the daemon is stopping") {
		t.Errorf("stream ended with error %v", err)
	}

	if err := <-ended; err != nil || time.Since(start) >= stopGrace {
		t.Errorf("Run: %v after %s", err, time.Since(start))
	}
}

func TestDirectoryLocks(t *testing.T) {
	for flag, directory := range map[string]func(*config.Config) string{
		"--cri-dockerd-root-directory": func(c *config.Config) string { return c.RootDirectory },
		"--run-directory":              func(c *config.Config) string { return c.RunDirectory },
	} {
		t.Run(flag, func(t *testing.T) {
			cfg := configure(t, t.TempDir())
			dir := directory(cfg)
			unlock, err := process.LockDirectory(flag, dir, 0)
			if err != nil {
				t.Fatal(err)
			}

			err = Run(t.Context(), cfg, "test", slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), flag) ||
				!strings.Contains(err.Error(), "another cri-dockerd") {
				t.Errorf("second daemon: got error %v", err)
			}

			unlock()
			again, err := process.LockDirectory(flag, dir, 0)
			if err != nil {
				t.Fatalf("after the first daemon: %v", err)
			}

			time.AfterFunc(50*time.Millisecond, again)
			third, err := process.LockDirectory(flag, dir, 10*time.Second)
			if err != nil {
				t.Fatalf("while another daemon is stopping: %v", err)
			}

			third()
		})
	}
}

func TestStartErrorNamesFlag(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()

	for arg, want := range map[string]string{
		"--container-runtime-endpoint=tcp://0.0.0.0:0":       "--tls-cert-file",
		"--container-runtime-endpoint=fd://":                 "--container-runtime-endpoint",
		"--docker-endpoint=nonsense":                         "--docker-endpoint",
		"--streaming-bind-addr=" + busy.Addr().String():      "--streaming-bind-addr",
		"--cri-dockerd-root-directory=/proc/nonexistent/dir": "--cri-dockerd-root-directory",
	} {
		t.Run(arg, func(t *testing.T) {
			err := Run(t.Context(), configure(t, t.TempDir(), arg), "test", slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got error %v, want %q in it", err, want)
			}
		})
	}
}
