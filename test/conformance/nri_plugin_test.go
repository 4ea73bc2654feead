package conformance

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"

	"cri-dockerd/test/engines"
)

// eachNRI runs a test on a node with NRI on, on each engine with the containerd shim.
// CONTAINERS=engine runs it without the shim.
func eachNRI(t *testing.T, test func(*testing.T, *node), args ...string) {
	t.Parallel()
	skipAtEndpoint(t)

	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, v)
			n.Daemon = n.eng.Daemon(t, append([]string{"--nri-socket=" + n.nriSocket(),
				"--nri-plugin-dir=" + filepath.Join(n.eng.Dir, "nri/plugins"),
				"--nri-config-dir=" + filepath.Join(n.eng.Dir, "nri/conf")}, args...)...)
			test(t, n)
		})
	}
}

func (n *node) nriSocket() string { return filepath.Join(n.eng.Dir, "nri/nri.sock") }

// plugin is an NRI plugin that records all events. The functions, if set, respond to events.
type plugin struct {
	name, index string
	stub        stub.Stub
	closed      chan struct{} // closed when the runtime has dropped the plugin
	synced      chan struct{} // closed after Synchronize

	onCreate func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error)
	onUpdate func(*api.Container, *api.LinuxResources) ([]*api.ContainerUpdate, error)
	onStop   func(*api.Container) []*api.ContainerUpdate
	onEvent  func(event string, pod *api.PodSandbox, c *api.Container) error // of the others

	mu         sync.Mutex
	events     []pluginEvent
	pods       []*api.PodSandbox // of Synchronize
	containers []*api.Container  // of Synchronize
}

type pluginEvent struct {
	name      string
	pod       *api.PodSandbox
	container *api.Container
}

// connect connects the plugin to the daemon and waits for Synchronize. It disconnects at the end of
// the test.
func (p *plugin) connect(t *testing.T, n *node) *plugin {
	t.Helper()
	p.closed, p.synced = make(chan struct{}), make(chan struct{})
	var err error
	p.stub, err = stub.New(p, stub.WithSocketPath(n.nriSocket()), stub.WithPluginName(p.name),
		stub.WithPluginIdx(p.index), stub.WithOnClose(func() { close(p.closed) }))
	if err == nil {
		eventually(t, "a registered plugin", func() bool { // the daemon may be starting
			err = p.stub.Start(t.Context())
			return err == nil
		})
	}

	if err != nil {
		t.Fatalf("plugin %s: %v", p.name, err)
	}

	t.Cleanup(p.stub.Stop)
	select {
	case <-p.synced:
	case <-p.closed:
		t.Fatalf("plugin %s was dropped before Synchronize", p.name)
	}

	return p
}

// isDropped reports whether the runtime has disconnected the plugin.
func (p *plugin) isDropped() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

func (p *plugin) record(name string, pod *api.PodSandbox, c *api.Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, pluginEvent{name, pod, c})
}

// all returns the events of one object, of all with the ID "".
func (p *plugin) all(id string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()

	var out []string
	for _, e := range p.events {
		if id == "" || e.id() == id {
			out = append(out, e.name)
		}
	}

	return out
}

// id returns the ID of the event's container, or of its pod.
func (e pluginEvent) id() string {
	if e.container != nil {
		return e.container.GetId()
	}
	return e.pod.GetId()
}

// find returns the first event with a name.
func (p *plugin) find(t *testing.T, name string) pluginEvent {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.events, func(e pluginEvent) bool { return e.name == name })
	if i < 0 {
		t.Fatalf("there was no event %s", name)
	}
	return p.events[i]
}

// handle records an event and responds with onEvent.
func (p *plugin) handle(name string, pod *api.PodSandbox, c *api.Container) error {
	p.record(name, pod, c)
	if p.onEvent == nil {
		return nil
	}
	return p.onEvent(name, pod, c)
}

func (p *plugin) Synchronize(
	_ context.Context, pods []*api.PodSandbox, containers []*api.Container,
) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods, p.containers = pods, containers
	close(p.synced)

	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.handle("RunPodSandbox", pod, nil)
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.handle("UpdatePodSandbox", pod, nil)
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.handle("PostUpdatePodSandbox", pod, nil)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.handle("StopPodSandbox", pod, nil)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.handle("RemovePodSandbox", pod, nil)
}

func (p *plugin) CreateContainer(
	_ context.Context, pod *api.PodSandbox, c *api.Container,
) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.record("CreateContainer", pod, c)
	if p.onCreate == nil {
		return nil, nil, nil
	}
	return p.onCreate(pod, c)
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.handle("PostCreateContainer", pod, c)
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.handle("StartContainer", pod, c)
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.handle("PostStartContainer", pod, c)
}

func (p *plugin) UpdateContainer(
	_ context.Context, pod *api.PodSandbox, c *api.Container, r *api.LinuxResources,
) ([]*api.ContainerUpdate, error) {
	p.record("UpdateContainer", pod, c)
	if p.onUpdate == nil {
		return nil, nil
	}
	return p.onUpdate(c, r)
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.handle("PostUpdateContainer", pod, c)
}

func (p *plugin) StopContainer(
	_ context.Context, pod *api.PodSandbox, c *api.Container,
) ([]*api.ContainerUpdate, error) {
	p.record("StopContainer", pod, c)
	if p.onStop == nil {
		return nil, nil
	}
	return p.onStop(c), nil
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.handle("RemoveContainer", pod, c)
}

// newPlugin returns a plugin that is not connected yet.
func newPlugin(index int, name string) *plugin {
	return &plugin{name: name, index: fmt.Sprintf("%02d", index)}
}
