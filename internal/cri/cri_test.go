package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/podstats"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/view"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testImage = "app:1"

var errBroken = errors.New("broken by the test")

// world is everything around a Service, in memory. fault decides which step of whom fails.
type world struct {
	mu          sync.Mutex
	fault       func(step string) error
	engineFault func(verb string, after bool) error
	// beforeLog, if set, runs before a log is made; it may call the service.
	beforeLog func()

	engine    *enginetest.Fake
	network   *podnet.Manager
	later     atomic.Int64 // the difference of the network's clock, in nanoseconds
	attached  map[string]bool
	adopted   map[string]bool // by the network
	pins      map[string]bool
	files     checkpoint.Files
	released  []podnet.Pod // what the network was told to release
	logs      map[string]bool
	mounted   map[string]bool // image volumes
	forgotten map[string]bool // of Stats

	logMode, logReason string                                      // of Logs.State
	delWait            atomic.Pointer[func(context.Context) error] // runs at the beginning of each DEL
	stray              atomic.Bool                                 // pauses do not join their namespaces
	next               byte
}

func (w *world) fails(step string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fault == nil {
		return nil
	}
	return w.fault(step)
}

// breakNth makes the n-th step from now fail; it tells which it was, "" if there were not so many.
func (w *world) breakNth(n int) (name func() string) {
	var hit string
	w.mu.Lock()
	defer w.mu.Unlock()

	w.fault = func(step string) error {
		if n--; n == 0 {
			hit = step
			return errBroken
		}
		return nil
	}

	return func() string {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fault = nil
		return hit
	}
}

func (w *world) set(m map[string]bool, key string, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on {
		m[key] = true
	} else {
		delete(m, key)
	}
}

func (w *world) has(m map[string]bool, key string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return m[key]
}

func keys(w *world, m map[string]bool) []string {
	w.mu.Lock()
	defer w.mu.Unlock()

	var out []string
	for k := range m {
		out = append(out, k)
	}

	slices.Sort(out)

	return out
}

type fakeNetwork struct{ *world }

func (n fakeNetwork) Add(_ context.Context, p podnet.Pod) ([]netip.Addr, error) {
	if p.NetNS == "" {
		return nil, errors.New("ADD without a network namespace")
	}
	if err := n.fails("network add"); err != nil {
		return nil, err
	}

	n.set(n.attached, p.ID, true)
	if err := n.fails("network add, after"); err != nil {
		return nil, err // by contract, the caller releases it
	}

	return n.IPs(p.ID), nil
}

func (n fakeNetwork) Del(ctx context.Context, p podnet.Pod) error {
	if wait := n.delWait.Load(); wait != nil {
		if err := (*wait)(ctx); err != nil {
			return err
		}
	}

	if err := n.fails("network del"); err != nil {
		return err
	}

	n.set(n.attached, p.ID, false)
	n.set(n.adopted, p.ID, false)
	n.mu.Lock()
	defer n.mu.Unlock()

	n.released = append(n.released, p)

	return nil
}

func (n fakeNetwork) IPs(id string) []netip.Addr {
	if !n.has(n.attached, id) {
		return nil
	}
	return []netip.Addr{netip.MustParseAddr("10.88.0.2"), netip.MustParseAddr("fd00::2")}
}
func (n fakeNetwork) Confirm(string) error                    { return n.fails("network confirm") }
func (n fakeNetwork) Check(context.Context, podnet.Pod) error { return n.fails("network check") }
func (n fakeNetwork) Collect(context.Context) error           { return n.fails("network collect") }
func (n fakeNetwork) Notice() string                          { return "" }
func (n fakeNetwork) Adopt(id string)                         { n.set(n.adopted, id, true) }
func (n fakeNetwork) Attached() []string {
	return append(keys(n.world, n.attached), keys(n.world, n.adopted)...)
}
func (n fakeNetwork) Ready() error                      { return n.fails("network ready") }
func (n fakeNetwork) SetPodCIDR(_ []netip.Prefix) error { return nil }
func (n fakeNetwork) Connector() podnet.Connector       { return n }
func (n fakeNetwork) Run(context.Context)               {}
func (n fakeNetwork) Close() error                      { return nil }

type fakePins struct{ *world }

func (p fakePins) Pin(id model.ContainerID, pid int) (string, error) {
	if pid == 0 {
		return "", errors.New("pin of a process that does not run")
	}
	if err := p.fails("pin"); err != nil {
		return "", err
	}

	p.set(p.pins, string(id), true)

	return p.Path(id), p.fails("pin, after")
}

func (p fakePins) Path(id model.ContainerID) string {
	if p.has(p.pins, string(id)) {
		return "/run/netns/" + string(id)
	}
	return ""
}

func (p fakePins) Addresses(_ model.ContainerID, pid int) []netip.Addr {
	if pid == 0 {
		return nil
	}
	return []netip.Addr{netip.MustParseAddr("10.99.0.9")}
}

func (p fakePins) Unpin(id model.ContainerID) error {
	p.set(p.pins, string(id), false)
	return nil
}
func (p fakePins) Create(map[string]string) (string, error) {
	if err := p.fails("netns"); err != nil {
		return "", err
	}
	p.set(p.pins, "new", true)
	return "/run/netns/new", nil
}
func (p fakePins) Drop(string) error { return p.Unpin("new") }
func (p fakePins) Sweep() error      { return p.fails("sweep") }
func (p fakePins) Keep(id model.ContainerID, path string) (string, error) {
	if path != "/run/netns/new" {
		return "", errors.New("keep of what was not made")
	}
	if err := p.fails("keep"); err != nil {
		return "", err
	}

	p.set(p.pins, string(id), true)

	return p.Path(id), p.fails("keep, after")
}
func (p fakePins) Joined(model.ContainerID, int) bool { return !p.stray.Load() }
func (p fakePins) OpenPin(id model.ContainerID) (*os.File, error) {
	if !p.has(p.pins, string(id)) {
		return nil, errdefs.ErrNotFound
	}
	return os.Open(os.DevNull)
}
func (p fakePins) List() (ids []model.ContainerID) {
	for _, id := range keys(p.world, p.pins) {
		ids = append(ids, model.ContainerID(id))
	}
	return ids
}

type fakeLogs struct{ *world }

func (l fakeLogs) Config(context.Context, string, string) (spec.LogConfig, error) {
	return spec.LogConfig{Driver: "json-file"}, l.fails("logs.Config")
}
func (l fakeLogs) State() (active, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.logMode, l.logReason
}
func (l fakeLogs) Reopen(_ context.Context, c *spec.Container) error {
	if err := l.fails("logs.Reopen"); err != nil {
		return err
	}
	l.set(l.world.logs, string(c.ID)+" reopened", true)
	return nil
}
func (l fakeLogs) Started(_ context.Context, c *spec.Container) error {
	if err := l.fails("log"); err != nil {
		return err
	}

	if l.beforeLog != nil {
		l.beforeLog()
	}

	l.set(l.logs, string(c.ID), true)

	return nil
}

func (l fakeLogs) Removed(_ context.Context, c *spec.Container) error {
	l.set(l.logs, string(c.ID), false)
	return nil
}

type fakeVolumes struct{ *world }

func (v fakeVolumes) Mount(id model.ImageID, layers []string) error {
	if len(layers) == 0 {
		return errors.New("mount of nothing")
	}
	if err := v.fails("mount image"); err != nil {
		return err
	}

	v.set(v.mounted, string(id), true)

	return v.fails("mount image, after")
}

func (v fakeVolumes) Unmount(id model.ImageID) error {
	v.set(v.mounted, string(id), false)
	return nil
}

func (v fakeVolumes) List() (ids []model.ImageID, err error) {
	for _, id := range keys(v.world, v.mounted) {
		ids = append(ids, model.ImageID(id))
	}
	return ids, nil
}

func (v fakeVolumes) Resolve(id model.ImageID, subPath string) (string, error) {
	if subPath == "missing" {
		return "", fmt.Errorf("no %s: %w", subPath, errdefs.ErrNotFound)
	}
	return path.Join("/run/image-volumes", string(id), subPath), v.fails("resolve")
}

type fakeStreams struct{}

func (fakeStreams) GetExec(*runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	return &runtimeapi.ExecResponse{Url: "http://127.0.0.1:1/exec/x"}, nil
}

func (fakeStreams) GetAttach(*runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return &runtimeapi.AttachResponse{Url: "http://127.0.0.1:1/attach/x"}, nil
}

func (fakeStreams) GetPortForward(*runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	return &runtimeapi.PortForwardResponse{Url: "http://127.0.0.1:1/portforward/x"}, nil
}

// newService is a Service in a world, with its view running.
func newService(t testing.TB) (*Service, *world) {
	t.Helper()
	return newServiceWith(t, "")
}

// newServiceWith is one with a reason why the engine is to make network namespaces.
func newServiceWith(t testing.TB, engineNetNS string) (*Service, *world) {
	t.Helper()
	w := &world{
		engine:    enginetest.NewFake(testImage),
		attached:  map[string]bool{},
		adopted:   map[string]bool{},
		files:     checkpoint.New(t.TempDir()),
		pins:      map[string]bool{},
		logs:      map[string]bool{},
		mounted:   map[string]bool{},
		forgotten: map[string]bool{},
		logMode:   "json-file",
	}

	log := slog.New(slog.DiscardHandler)
	view := view.New(w.engine, log)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = view.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	<-view.Synced()
	w.engine.Fault = func(verb string, after bool) error {
		w.mu.Lock()
		f := w.engineFault
		w.mu.Unlock()
		if f != nil {
			return f(verb, after)
		}

		switch verb {
		// the verbs of making; the view and the undo have their own tests
		case "create", "start", "pause image", "hold image":
			if after {
				verb += ", after"
			}
			return w.fails(verb)
		}

		return nil
	}

	reporter := podstats.New(podstats.Config{
		View:    view,
		Usage:   fakeStats{world: w},
		Details: fakeStats{world: w},
		ImageFS: imagefs.New(log),
		Log:     log,
	})

	w.network = podnet.NewManager(podnet.ManagerConfig{
		Network:     fakeNetwork{w},
		Namespaces:  fakePins{w},
		Pins:        fakePins{w},
		Checkpoints: w.files,
		Now:         func() time.Time { return time.Now().Add(time.Duration(w.later.Load())) },
		Log:         log,
	})

	return New(Deps{
		Log:         log,
		Engine:      w.engine,
		Images:      w.engine,
		View:        view,
		ImageView:   view,
		Network:     w.network,
		Node:        w.network,
		Reclaimer:   w.network,
		Logs:        fakeLogs{w},
		Stats:       reporter,
		Volumes:     fakeVolumes{w},
		Streams:     fakeStreams{},
		EngineNetNS: engineNetNS,
	}), w
}

// pod is a small pod with a name of its own.
func (w *world) pod() *runtimeapi.PodSandboxConfig {
	w.mu.Lock()
	defer w.mu.Unlock()

	w.next++
	name := fmt.Sprintf("pod-%d", w.next)

	return &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{
		Name:      name,
		Namespace: "default",
		Uid:       "uid-" + name,
	}, LogDirectory: "/var/log/pods/" + name}
}

func runPod(t testing.TB, s *Service, cfg *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	r, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	return r.PodSandboxId
}

func createRequest(pod string, cfg *runtimeapi.PodSandboxConfig) *runtimeapi.CreateContainerRequest {
	return &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod,
		SandboxConfig: cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: testImage},
			LogPath:  "main.log",
		},
	}
}

// nothingLeft fails if the world still holds something.
func (w *world) nothingLeft(t *testing.T, s *Service) {
	t.Helper()
	if n := w.engine.Containers(); n != 0 {
		t.Errorf("%d containers are left", n)
	}

	for what, m := range map[string]map[string]bool{
		"attachments":      w.attached,
		"adopted networks": w.adopted,
		"pins":             w.pins,
		"logs":             w.logs,
		"image volumes":    w.mounted,
	} {
		if left := keys(w, m); len(left) > 0 {
			t.Errorf("%s are left: %v", what, left)
		}
	}

	if held, err := w.engine.HeldImages(t.Context()); err != nil || len(held) > 0 {
		t.Errorf("images are held: %v, %v", held, err)
	}

	if l, err := received(s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})); err != nil ||
		len(l.Items) > 0 {
		t.Errorf("the list still shows %v, %v", l, err)
	}
}

// stepsOf are the steps that a call takes when nothing fails.
func (w *world) stepsOf(call func()) []string {
	var steps []string
	w.setFault(func(step string) error { steps = append(steps, step); return nil })
	call()
	w.setFault(nil)
	return steps
}

// breakOnce makes one step fail, once.
func (w *world) breakOnce(name string) {
	w.setFault(func(step string) error {
		if step == name {
			name = ""
			return errBroken
		}
		return nil
	})
}

func (w *world) setFault(f func(step string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
}

// setEngineFault puts a fault of a test's own in the place of setFault's at the engine. The view
// asks the engine, too, whenever it likes.
func (w *world) setEngineFault(f func(verb string, after bool) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.engineFault = f
}

// TestRunPodSandboxFailsAtEachStep breaks every step of RunPodSandbox in turn, before and after its
// effect: nothing is left, and a retry succeeds.
func TestRunPodSandboxFailsAtEachStep(t *testing.T) {
	for reason, want := range map[string][]string{
		"": {"create", "create, after", "keep", "keep, after", "netns", "network add", "network add, after",
			"network confirm", "pause image", "pause image, after", "start", "start, after"},
		"by a flag": {"create", "create, after", "network add", "network add, after", "network confirm", "pause image",
			"pause image, after", "pin", "pin, after", "start", "start, after"},
	} {
		s, w := newServiceWith(t, reason)
		remove := func(id string) {
			t.Helper()
			if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err !=
				nil {
				t.Errorf("RemovePodSandbox: %v", err)
			}
			w.nothingLeft(t, s)
		}

		var first string
		steps := w.stepsOf(func() { first = runPod(t, s, w.pod()) })
		remove(first)
		slices.Sort(steps)
		if !slices.Equal(steps, want) {
			t.Errorf("steps %q, want %q: a step was added or lost", steps, want)
		}

		for _, step := range steps {
			cfg := w.pod()
			w.breakOnce(step)
			r, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			w.setFault(nil)
			if err == nil || r != nil {
				t.Errorf("%s broke and RunPodSandbox answered %v, %v", step, r, err)
			}

			if !errors.Is(err, errBroken) {
				t.Errorf("%s: the cause is lost: %v", step, err)
			}

			w.nothingLeft(t, s)
			remove(runPod(t, s, cfg))
		}
	}
}

func TestCreateAndStartFailAtEachStep(t *testing.T) {
	s, w := newService(t)
	for n := 1; ; n++ {
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		name := w.breakNth(n)
		c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
		if err == nil {
			_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
		}

		step := name()
		if step == "" {
			break
		}
		if err == nil {
			t.Errorf("%s broke without an error", step)
		}

		if c == nil { // the kubelet tries again at once
			if c, err = s.CreateContainer(t.Context(), createRequest(pod, cfg)); err != nil {
				t.Errorf("%s: the retry: %v", step, err)
			}
		}

		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err !=
			nil {
			t.Errorf("%s: RemovePodSandbox: %v", step, err)
		}

		w.nothingLeft(t, s)
		if n > 50 {
			t.Fatal("the steps do not end")
		}
	}
}

func TestCancelledRunLeavesNothing(t *testing.T) {
	s, w := newService(t)
	for _, at := range []string{"create, after", "start", "start, after", "network add"} {
		ctx, cancel := context.WithCancel(t.Context())
		w.fault = func(step string) error {
			if step == at {
				cancel()
				return ctx.Err()
			}
			return nil
		}
		if _, err := s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errors.Is(err,
			context.Canceled) {
			t.Errorf("cancelled at %s: %v", at, err)
		}

		cancel()
		w.fault = nil
		w.nothingLeft(t, s)
	}
}

func TestFailedUndoKeepsTheSandboxListed(t *testing.T) {
	s, w := newService(t)
	w.fault = func(step string) error {
		if step == "network add, after" || step == "network del" {
			return errBroken
		}
		return nil
	}
	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()}); err == nil {
		t.Fatal("RunPodSandbox succeeded")
	}

	l, err := received(s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}))
	if err != nil || len(l.Items) != 1 || l.Items[0].State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Fatalf("list: %v, %v", l, err)
	}

	w.fault = nil
	if _, err := s.RemovePodSandbox(t.Context(),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: l.Items[0].Id}); err != nil {
		t.Error(err)
	}

	w.nothingLeft(t, s)
}

func TestRunPodSandboxTwice(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	first := runPod(t, s, cfg)
	if second := runPod(t, s, cfg); second != first {
		t.Errorf("the second call made another sandbox")
	}

	w.engine.End(model.ContainerID(first), 0) // the pause was killed: the retry replaces the leftover
	if third := runPod(t, s, cfg); third == first {
		t.Error("a dead sandbox was handed out")
	}
}

func TestStartTwice(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	start := func() error {
		_, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
		return err
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}

	if err := start(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start of a running container: %v", err)
	}
}

// TestNameInUseByARunningContainer makes sure that undoing never touches what the call has not
// made.
func TestNameInUseByARunningContainer(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err !=
		nil {
		t.Fatal(err)
	}

	if _, err := s.CreateContainer(t.Context(), createRequest(pod, cfg)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create under a name in use: %v", err)
	}

	st, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
	if err != nil || st.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the running container: %v, %v", st, err)
	}
}

func TestEngineDown(t *testing.T) {
	s, w := newService(t)
	w.engine.SetDown(true)
	eventually(t, func() bool { return !s.View.Engine().Ready })
	if _, err := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("a list while the engine is down: %v", err)
	}

	st, err := s.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil || st.Status.Conditions[0].Status || st.Status.Conditions[0].Message == "" {
		t.Errorf("Status: %v, %v", st, err)
	}

	w.engine.SetDown(false)
	eventually(t, func() bool { return s.View.Engine().Ready })
	if _, err := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s")
		}
	}
}

func TestRecover(t *testing.T) {
	s, w := newService(t)
	healthy, lost, dead := runPod(t, s, w.pod()), runPod(t, s, w.pod()), runPod(t, s, w.pod())
	w.engine.Drop(model.ContainerID(lost))
	w.engine.End(model.ContainerID(dead), 0)
	halfMade, failed := createPause(t, w), createPause(t, w)
	w.engine.End(failed, 128) // as after a start that failed
	eventually(t, func() bool {
		_, err := s.View.Sandbox(lost)
		sb, halfErr := s.View.Sandbox(string(halfMade))
		f, failedErr := s.View.Sandbox(string(failed))
		d, deadErr := s.View.Sandbox(dead)
		return err != nil && halfErr == nil && !sb.Running && failedErr == nil && !f.NeverStarted && deadErr == nil &&
			!d.Running
	})

	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	if got := keys(w, w.attached); !slices.Equal(got, []string{healthy}) {
		t.Errorf("attached after recovery: %v, want only %s", got, healthy)
	}
	if got := keys(w, w.pins); !slices.Equal(got, []string{healthy}) {
		t.Errorf("pins after recovery: %v", got)
	}

	for _, id := range []model.ContainerID{halfMade, failed} {
		if _, err := s.View.Sandbox(string(id)); !errdefs.IsNotFound(err) {
			t.Errorf("the half-made sandbox %s: %v", id, err)
		}
	}

	if _, err := s.View.Sandbox(dead); err != nil {
		t.Errorf("a dead pod is the kubelet's to remove: %v", err)
	}
}

// createPause creates a sandbox behind the service's back and does not start it.
func createPause(t *testing.T, w *world) model.ContainerID {
	t.Helper()
	o := spec.SandboxOptions{
		Image:       spec.PauseImage{Source: enginetest.PauseRef, Name: enginetest.PauseRef},
		NetworkMode: "none",
	}

	create, err := spec.NewSandbox(w.pod(), o)
	if err != nil {
		t.Fatal(err)
	}

	id, err := w.engine.Create(t.Context(), create)
	if err != nil {
		t.Fatal(err)
	}

	return id
}

func TestExecSync(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	exec := func(timeout int64, cmd ...string) (*runtimeapi.ExecSyncResponse, error) {
		return s.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: c.ContainerId,
			Cmd:         cmd,
			Timeout:     timeout,
		})
	}
	if _, err := exec(0, "true"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in a created container: %v", err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err !=
		nil {
		t.Fatal(err)
	}

	if r, err := exec(0, "say", "it"); err != nil || string(r.Stdout) != "say it\n" || r.ExitCode != 0 {
		t.Errorf("exec: %v, %v", r, err)
	}

	if r, err := exec(0, "fail"); err != nil || r.ExitCode != 1 {
		t.Errorf("exec of what fails: %v, %v", r, err)
	}

	if _, err := exec(1, "hang"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec of what hangs: %v", err)
	}
}

// testID is an ID of a container that begins with digits.
func testID(digits string) string { return digits + strings.Repeat("0", 64-len(digits)) }
