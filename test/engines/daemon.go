package engines

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodCIDR is the range of kubenet on test engines.
const PodCIDR = "10.88.0.0/16"

// Daemon is a cri-dockerd running on an engine.
type Daemon struct {
	Socket string // of the CRI
	// Program is a static build, as shipped. The daemon itself runs with the race detector if the
	// tests do.
	Program string
	// PinDir contains the records of pinned network namespaces: links by sandbox ID. Their targets
	// exist only inside the engine's namespaces.
	PinDir     string
	CacheDir   string // of libcni's cache
	PendingDir string // of connections in progress
	LeaseDir   string // of host-local's addresses
	Runtime    runtimeapi.RuntimeServiceClient
	Image      runtimeapi.ImageServiceClient

	engine  *Engine
	own     []string // its default flags
	args    []string // the flags of the test; they override own
	running string   // the program of the running daemon
	name    string   // of its log and PID files
	metrics string   // socket of the metrics page
}

// Connect returns the clients of an external CRI socket, unix:///path.
func Connect(tb TB, endpoint string, options ...grpc.DialOption) *Daemon {
	tb.Helper()
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	conn, err := grpc.NewClient(endpoint, options...)
	if err != nil {
		tb.Fatalf("connect to %s: %v", endpoint, err)
	}

	tb.Cleanup(func() { conn.Close() })

	return &Daemon{Runtime: runtimeapi.NewRuntimeServiceClient(conn), Image: runtimeapi.NewImageServiceClient(conn)}
}

// maxMessage is the largest response accepted by clients, in bytes: twice 16 MiB of output, and
// some room.
const maxMessage = 64 << 20

// Program builds cri-dockerd, static as shipped, and returns its path.
func (e *Engine) Program(tb TB) string {
	tb.Helper()
	program := filepath.Join(e.Dir, "cri-dockerd")
	e.program(tb, program, false)
	return program
}

// program replaces a possibly running cri-dockerd by a new build.
func (e *Engine) program(tb TB, file string, detect bool) {
	tb.Helper()
	Build(tb, file+".new", "cri-dockerd/cmd/cri-dockerd", "", detect)
	if err := os.Rename(file+".new", file); err != nil {
		tb.Fatalf("daemon: %v", err)
	}
}

// Daemon starts a cri-dockerd with kubenet on the engine. args override its default flags. It ends
// with the test.
func (e *Engine) Daemon(tb TB, args ...string) *Daemon {
	tb.Helper()
	name := "cri-dockerd-" + random()
	lib := filepath.Join(e.Dir, "root/var/lib/cni")
	d := &Daemon{
		Socket:     filepath.Join(e.Dir, name+".sock"),
		Program:    filepath.Join(e.Dir, "cri-dockerd"),
		PinDir:     filepath.Join(e.Dir, "run/netns"),
		CacheDir:   filepath.Join(lib, "cache/results"),
		PendingDir: filepath.Join(lib, "cache/pending"),
		LeaseDir:   filepath.Join(lib, "networks"),
		engine:     e,
		name:       name,
		metrics:    filepath.Join(e.Dir, name+"-metrics.sock"),
	}

	d.running = d.Program + "-running"
	e.program(tb, d.Program, false)
	e.program(tb, d.running, true)
	d.own = []string{
		"--container-runtime-endpoint=unix://" + d.Socket, "--docker-endpoint=unix://" + e.Socket,
		"--network-plugin=kubenet",
		"--cri-dockerd-root-directory=" + filepath.Join(e.Dir, "lib-"+name), "--run-directory=" +
			filepath.Join(e.Dir, "run"), "--log-level=debug",
		"--metrics-bind-address=unix://" + d.metrics,
	}
	if !slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "--pod-cidr=") }) { // ranges add up
		d.own = append(d.own, "--pod-cidr="+PodCIDR)
	}

	// CONTAINERS=engine runs any test without the containerd shim.
	if mode := os.Getenv("CONTAINERS"); mode != "" {
		d.own = append(d.own, "--containers="+mode)
	}

	d.args = args
	var answers checked
	clients := Connect(tb, "unix://"+d.Socket, answers.options()...)
	d.Runtime, d.Image = clients.Runtime, clients.Image
	tb.Cleanup(func() {
		e.signal(tb, d.name, "TERM")
		if tb.Failed() {
			tail(tb, d.Log(), 60)
			tail(tb, filepath.Join(e.Dir, "run/log-driver/log"), 30)
		}

		if b, _ := os.ReadFile(d.Log()); panicked.Match(b) {
			tb.Fatalf("the daemon panicked:\n%s", b)
		}

		answers.end(tb)
	})

	d.Restart(tb)

	return d
}

var panicked = regexp.MustCompile(`(?m)^panic:|msg=panic|DATA RACE`)

// Pin returns the path of a pod's pinned network namespace inside the engine's namespaces.
func (d *Daemon) Pin(tb TB, pod string) string {
	tb.Helper()
	path, err := os.Readlink(filepath.Join(d.PinDir, pod))
	if err != nil {
		tb.Fatalf("pin of pod %s: %v", pod, err)
	}
	return strings.Replace(path, "/var/run/", "/run/", 1) // the link is valid only inside
}

// Metrics returns the daemon's metrics page.
func (d *Daemon) Metrics(tb TB) string {
	tb.Helper()
	code, page := d.Get(tb, "/metrics")
	if code != http.StatusOK {
		tb.Fatalf("metrics: %d: %s", code, page)
	}
	return page
}

// Get returns the response of the daemon's HTTP endpoint.
func (d *Daemon) Get(tb TB, path string) (code int, page string) {
	tb.Helper()
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.metrics)
	}, DisableKeepAlives: true}}
	r, err := c.Get("http://daemon" + path)
	if err != nil {
		tb.Fatalf("%s: %v", path, err)
		return 0, ""
	}
	defer r.Body.Close()

	b, err := io.ReadAll(r.Body)
	if err != nil {
		tb.Fatalf("%s: %v", path, err)
	}

	return r.StatusCode, string(b)
}

// Log returns the path of the daemon's log.
func (d *Daemon) Log() string { return filepath.Join(d.engine.Dir, d.name+".log") }

// Kill kills the daemon with SIGKILL.
func (d *Daemon) Kill(tb TB) {
	tb.Helper()
	d.engine.signal(tb, d.name, "KILL")
}

// Stop stops the daemon gracefully.
func (d *Daemon) Stop(tb TB) {
	tb.Helper()
	d.engine.signal(tb, d.name, "TERM")
}

// Reload sends SIGHUP.
func (d *Daemon) Reload(tb TB) {
	tb.Helper()
	if out, err := d.engine.Command("sh", "-c", "kill -HUP $(cat "+d.engine.Dir+"/"+d.name+
		".pid)").CombinedOutput(); err != nil {
		tb.Fatalf("reload: %v %s", err, out)
	}
}

// Change stops the daemon gracefully and starts it with other flags. It does not wait until the
// runtime is ready, since it may never be.
func (d *Daemon) Change(tb TB, args ...string) {
	tb.Helper()
	d.engine.signal(tb, d.name, "TERM")
	d.args = args
	d.begin(tb)
}

func (d *Daemon) begin(tb TB) {
	tb.Helper()
	d.engine.background(tb, d.name, d.running, slices.Concat(d.own, d.args)...)
}

// Start starts a stopped daemon and does not wait for it.
func (d *Daemon) Start(tb TB) {
	tb.Helper()
	_ = os.Remove(filepath.Join(d.engine.Dir, d.name+".pid"))
	d.begin(tb)
}

// Running reports whether the daemon is running.
func (d *Daemon) Running() bool { return d.engine.runs(d.name) }

// Started reports whether the last started daemon has its process.
func (d *Daemon) Started() bool { return d.engine.started(d.name) }

// Restart starts the daemon and waits until the runtime is ready.
func (d *Daemon) Restart(tb TB) {
	tb.Helper()
	d.begin(tb)
	d.AwaitReady(tb)
}

// AwaitReady waits until the runtime is ready, and the trial of the containerd shim has ended.
func (d *Daemon) AwaitReady(tb TB) {
	tb.Helper()
	ready := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s, err := d.Runtime.Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
		return err == nil && s.Status.Conditions[0].Status &&
			!slices.ContainsFunc(s.Status.Conditions, func(c *runtimeapi.RuntimeCondition) bool {
				return c.Reason == "Pending"
			})
	}
	if !Within(startDeadline, ready) {
		tail(tb, d.Log(), 60)
		tb.Fatalf("the daemon is not ready")
	}
}

// Threads returns the number of the daemon's threads.
func (d *Daemon) Threads(tb TB) int {
	tb.Helper()
	out, err := d.engine.Command("sh", "-c", "grep Threads /proc/$(cat "+d.engine.Dir+"/"+d.name+
		".pid)/status").Output()
	if err != nil {
		tb.Fatalf("threads: %v", err)
	}

	n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(string(out), "Threads:")))
	if err != nil {
		tb.Fatalf("threads: %v", err)
	}

	return n
}

// RSS returns the daemon's resident memory in bytes.
func (d *Daemon) RSS(tb TB) int64 {
	tb.Helper()
	out, err := d.engine.Command("sh", "-c", "grep VmRSS /proc/$(cat "+d.engine.Dir+"/"+d.name+".pid)/status").Output()
	f := strings.Fields(string(out))
	if err != nil || len(f) != 3 {
		tb.Fatalf("RSS: %q, %v", out, err)
		return 0
	}

	kib, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		tb.Fatalf("RSS: %v", err)
	}

	return kib << 10
}

// heapAlloc is the line of runtime.MemStats in a heap profile with debug=1 (runtime/pprof).
var heapAlloc = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// Heap returns the bytes of the daemon's objects in use. Unlike RSS it does not depend on the
// garbage collector, nor on the race detector, which keeps memory of each goroutine for some time.
func (d *Daemon) Heap(tb TB) int64 {
	tb.Helper()
	var m []string
	for range 3 { // a sync.Pool keeps its elements for two collections
		_, page := d.Get(tb, "/debug/pprof/heap?gc=1&debug=1")
		m = heapAlloc.FindStringSubmatch(page)
	}

	if m == nil {
		tb.Fatalf("the heap profile has no HeapAlloc")
		return 0
	}

	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		tb.Fatalf("heap: %v", err)
	}

	return n
}

// CPU returns the daemon's CPU time, of all threads together (schedstat,
// Documentation/scheduler/sched-stats.rst).
func (d *Daemon) CPU(tb TB) time.Duration {
	tb.Helper()
	out, err := d.engine.Command("sh", "-c", "cat /proc/$(cat "+d.engine.Dir+"/"+d.name+
		".pid)/task/*/schedstat").Output()
	sum, parseErr := sumSchedstat(string(out))
	if err != nil || parseErr != nil || sum == 0 {
		tb.Fatalf("CPU: %q, %v, %v", out, err, parseErr)
	}

	return sum
}

// Hurry gives the daemon precedence over all other processes, for benchmarks on a busy machine.
func (d *Daemon) Hurry(tb TB) {
	tb.Helper()
	if out, err := d.engine.Command("sh", "-c", "chrt -a -r -p 1 $(cat "+d.engine.Dir+"/"+d.name+
		".pid)").CombinedOutput(); err != nil {
		tb.Fatalf("chrt: %v, %s", err, out)
	}
}
