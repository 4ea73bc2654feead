package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/podstats"
	"cri-dockerd/internal/view"
)

var errBroken = errors.New("broken by the test")

// world simulates everything around a Service, in memory. fault selects the failing steps.
type world struct {
	view        *view.View
	mu          sync.Mutex
	fault       func(step string) error
	engineFault func(verb string, after bool) error
	// beforeLog, if set, runs before the creation of a log; it may call the service.
	beforeLog func()

	engine    *enginetest.Fake
	store     *nri.Store
	network   *podnet.Manager
	later     atomic.Int64 // offset of the network's clock, in nanoseconds
	attached  map[string]bool
	adopted   map[string]bool // by the network
	pins      map[string]bool
	files     checkpoint.Files
	released  []podnet.Pod // networks released by request
	logs      map[string]bool
	mounted   map[string]bool // image volumes
	forgotten map[string]bool // of Stats

	logMode, logReason string          // of Logs.State
	appArmor           map[string]bool // loaded profiles; nil if the kernel does not list them

	delWait atomic.Pointer[func(context.Context) error] // runs at the beginning of each DEL
	stray   atomic.Bool                                 // pause processes do not join their namespaces
	next    byte
}

func (w *world) fails(step string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fault == nil {
		return nil
	}
	return w.fault(step)
}

// breakNth makes the n-th step from now fail. name returns the name of the step, "" if there were
// fewer.
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
		return "", errors.New("pin of a process not running")
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
		return "", errors.New("keep of an unknown namespace")
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

func (l fakeLogs) Config(context.Context, string, string) (model.LogConfig, error) {
	return model.LogConfig{Driver: "json-file"}, l.fails("logs.Config")
}
func (l fakeLogs) State() (active, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.logMode, l.logReason
}
func (l fakeLogs) Reopen(_ context.Context, c *model.Container) error {
	if err := l.fails("logs.Reopen"); err != nil {
		return err
	}
	l.set(l.world.logs, string(c.ID)+" reopened", true)
	return nil
}
func (l fakeLogs) Started(_ context.Context, c *model.Container) error {
	if err := l.fails("log"); err != nil {
		return err
	}

	if l.beforeLog != nil {
		l.beforeLog()
	}

	l.set(l.logs, string(c.ID), true)

	return nil
}

func (l fakeLogs) Removed(_ context.Context, c *model.Container) error {
	l.set(l.logs, string(c.ID), false)
	return nil
}

type fakeVolumes struct{ *world }

func (v fakeVolumes) Mount(id model.ImageID, layers []string) error {
	if len(layers) == 0 {
		return errors.New("mount without layers")
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

// newService returns a Service in a world, with its view running.
func newService(t testing.TB) (*Service, *world) {
	t.Helper()
	return newServiceWith(t, "")
}

// newServiceWith returns a Service with a reason to let the engine create network namespaces.
func newServiceWith(t testing.TB, engineNetNS string) (*Service, *world) {
	t.Helper()
	return newServiceFor(t, engineNetNS, nil)
}

// breakEngine is the Fault of the engine.
func (w *world) breakEngine(verb string, after bool) error {
	w.mu.Lock()
	f := w.engineFault
	w.mu.Unlock()
	if f != nil {
		return f(verb, after)
	}

	switch verb {
	// only the creating verbs; the view and the undo have their own tests
	case "create", "start", "pause image", "hold image":
		if after {
			verb += ", after"
		}
		return w.fails(verb)
	}

	return nil
}

// newServiceFor returns a Service with NRI plugins, nil for none.
func newServiceFor(t testing.TB, engineNetNS string, plugins Plugins) (*Service, *world) {
	t.Helper()
	store, err := nri.OpenStore(filepath.Join(t.TempDir(), "nri"))
	if err != nil {
		t.Fatal(err)
	}

	w := &world{
		store:     store,
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
	w.view = view.New(w.engine, log)
	visible := view.Visible{View: w.view}
	w.view.Conceal(store.IsUnfinished)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = w.view.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	<-w.view.Synced()
	w.engine.Fault = w.breakEngine
	reporter := podstats.New(podstats.Config{
		View:    visible,
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
		Accounts:    w.engine,
		Checkpoints: w.engine,
		View:        w.view,
		States:      w.view,
		Updates:     w.view,
		ImageView:   w.view,
		Network:     w.network,
		Node:        w.network,
		Reclaimer:   w.network,
		Logs:        fakeLogs{w},
		Stats:       reporter,
		Volumes:     fakeVolumes{w},
		Streams:     fakeStreams{},
		AppArmor:    fakeAppArmor{w},
		Concealer:   w.view,
		Visible:     visible,
		Plugins:     plugins,
		PluginStore: w.store,
		EngineNetNS: engineNetNS,
	}), w
}

// pod returns a small pod with a unique name.
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

// assertNoLeftovers fails the test if the world still holds resources.
func (w *world) assertNoLeftovers(t *testing.T, s *Service) {
	t.Helper()
	if n := w.engine.Containers(); n != 0 {
		t.Errorf("%d containers remain", n)
	}

	for what, m := range map[string]map[string]bool{
		"attachments":      w.attached,
		"adopted networks": w.adopted,
		"pins":             w.pins,
		"logs":             w.logs,
		"image volumes":    w.mounted,
	} {
		if remaining := keys(w, m); len(remaining) > 0 {
			t.Errorf("%s remain: %v", what, remaining)
		}
	}

	if held, err := w.engine.HeldImages(t.Context()); err != nil || len(held) > 0 {
		t.Errorf("images are still held: %v, %v", held, err)
	}

	if l, err := received(s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})); err != nil ||
		len(l.Items) > 0 {
		t.Errorf("the list still shows %v, %v", l, err)
	}
}

// stepsOf returns the steps of a successful call.
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

// setEngineFault replaces setFault's fault at the engine with a fault of the test. The view calls
// the engine concurrently, too.
func (w *world) setEngineFault(f func(verb string, after bool) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.engineFault = f
}
