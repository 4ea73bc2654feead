package engines

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodCIDR is the range of kubenet on test engines.
const PodCIDR = "10.88.0.0/16"

// Daemon is a cri-dockerd on an engine.
type Daemon struct {
	Socket   string // of the CRI
	Program  string
	PinDir   string // of pinned network namespaces; the mounts are seen inside only
	CacheDir string // of libcni's cache
	LeaseDir string // of host-local's addresses
	Runtime  runtimeapi.RuntimeServiceClient
	Image    runtimeapi.ImageServiceClient

	engine *Engine
	args   []string
	name   string // of its log and PID files
}

// Daemon starts a cri-dockerd with kubenet on the engine; args come after its own and win. It ends with the test.
func (e *Engine) Daemon(tb TB, args ...string) *Daemon {
	tb.Helper()
	name := "cri-dockerd-" + random()
	lib := filepath.Join(e.Dir, "root/var/lib/cni")
	d := &Daemon{
		Socket: filepath.Join(e.Dir, name+".sock"), Program: filepath.Join(e.Dir, "cri-dockerd"), PinDir: filepath.Join(e.Dir, "run/netns"),
		CacheDir: filepath.Join(lib, "cache/results"), LeaseDir: filepath.Join(lib, "networks/kubenet"), engine: e, name: name,
	}
	build(tb, d.Program+".new", "cri-dockerd/cmd/cri-dockerd", "")
	if err := os.Rename(d.Program+".new", d.Program); err != nil { // one may be running
		tb.Fatalf("daemon: %v", err)
	}
	d.args = append([]string{
		"--container-runtime-endpoint=unix://" + d.Socket, "--docker-endpoint=unix://" + e.Socket, "--network-plugin=kubenet", "--pod-cidr=" + PodCIDR,
		"--cri-dockerd-root-directory=" + filepath.Join(e.Dir, "lib-"+name), "--run-directory=" + filepath.Join(e.Dir, "run"), "--log-level=debug",
	}, args...)
	conn, err := grpc.NewClient("unix://"+d.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		tb.Fatalf("daemon: %v", err)
	}
	d.Runtime, d.Image = runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	tb.Cleanup(func() {
		conn.Close()
		e.signal(tb, d.name, "TERM")
		if tb.Failed() {
			tail(tb, d.Log(), 60)
		}
		if b, _ := os.ReadFile(d.Log()); panicked.Match(b) {
			tb.Fatalf("the daemon panicked:\n%s", b)
		}
	})
	d.Restart(tb)
	return d
}

var panicked = regexp.MustCompile(`(?m)^panic:|msg=panic|DATA RACE`)

// Log is the file of the daemon's log.
func (d *Daemon) Log() string { return filepath.Join(d.engine.Dir, d.name+".log") }

// Kill kills the daemon with SIGKILL.
func (d *Daemon) Kill(tb TB) {
	tb.Helper()
	d.engine.signal(tb, d.name, "KILL")
}

// Restart starts the daemon and waits until the runtime is ready.
func (d *Daemon) Restart(tb TB) {
	tb.Helper()
	d.engine.background(tb, d.name, d.Program, d.args...)
	ready := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s, err := d.Runtime.Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
		return err == nil && s.Status.Conditions[0].Status
	}
	if !poll(startDeadline, ready) {
		tail(tb, d.Log(), 60)
		tb.Fatalf("the daemon is not ready")
	}
}

// RSS is the daemon's resident memory in bytes.
func (d *Daemon) RSS(tb TB) int64 {
	tb.Helper()
	out, err := d.engine.Command("sh", "-c", "grep VmRSS /proc/$(cat "+d.engine.Dir+"/"+d.name+".pid)/status").Output()
	f := strings.Fields(string(out))
	if err != nil || len(f) != 3 {
		tb.Fatalf("RSS: %q, %v", out, err)
	}
	kib, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		tb.Fatalf("RSS: %v", err)
	}
	return kib << 10
}
