package nri

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// fakeNode has one pod with one container.
type fakeNode struct {
	mu      sync.Mutex
	updates []Update
	evicted []Eviction
}

func (*fakeNode) Objects() []Pod { return []Pod{testPod()} }

func testPod() Pod {
	return Pod{
		Sandbox:    &model.Sandbox{ID: testID, Metadata: &runtimeapi.PodSandboxMetadata{Name: "pod"}},
		Containers: []*model.Container{testContainer()},
	}
}

func testContainer() *model.Container {
	return &model.Container{ID: model.ContainerID(strings.Repeat("0d", 32)), SandboxID: testID}
}

func (n *fakeNode) Update(_ context.Context, updates []Update, evictions []Eviction) []Update {
	n.UpdateLater(updates, evictions)
	return updates[:1]
}

func (n *fakeNode) UpdateLater(updates []Update, evictions []Eviction) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.updates, n.evicted = append(n.updates, updates...), append(n.evicted, evictions...)
}

// testPlugin is a plugin that evicts the container of each of its responses and requests.
type testPlugin struct {
	stub   stub.Stub
	synced chan int // containers of Synchronize
	err    error    // for RunPodSandbox
	hang   chan struct{}
	adjust func(*api.ContainerAdjustment) // beside the environment; may be nil
}

func (p *testPlugin) Synchronize(
	_ context.Context, _ []*api.PodSandbox, containers []*api.Container,
) ([]*api.ContainerUpdate, error) {
	p.synced <- len(containers)
	u := &api.ContainerUpdate{ContainerId: string(testContainer().ID)}
	u.SetLinuxCPUShares(5)

	return []*api.ContainerUpdate{u}, nil
}

func (p *testPlugin) RunPodSandbox(context.Context, *api.PodSandbox) error { return p.err }

func (p *testPlugin) StartContainer(context.Context, *api.PodSandbox, *api.Container) error {
	<-p.hang
	return nil
}

func (p *testPlugin) CreateContainer(
	context.Context, *api.PodSandbox, *api.Container,
) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a := &api.ContainerAdjustment{}
	a.AddEnv("A", "b")
	if p.adjust != nil {
		p.adjust(a)
	}
	return a, nil, nil
}

func (p *testPlugin) UpdateContainer(
	_ context.Context, _ *api.PodSandbox, c *api.Container, _ *api.LinuxResources,
) ([]*api.ContainerUpdate, error) {
	u := &api.ContainerUpdate{ContainerId: c.GetId()}
	u.SetLinuxPidLimits(5)
	return []*api.ContainerUpdate{u}, nil
}

// evict adds an eviction to the responses of the plugin.
func evict(
	ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method,
) (any, error) {
	resp, err := method(ctx, unmarshal)
	if m, ok := resp.(*api.CreateContainerResponse); ok {
		m.Evict = []*api.ContainerEviction{{ContainerId: "response"}}
	}
	return resp, err
}

// requestEviction adds an eviction to the requests of the plugin.
func requestEviction(
	ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker,
) error {
	if req.Method == "UpdateContainers" {
		b, err := proto.Marshal(&api.UpdateContainersRequest{Evict: []*api.ContainerEviction{{ContainerId: "request"}}})
		if err != nil {
			return err
		}
		req.Payload = append(req.Payload, b...) // messages merge
	}
	return call(ctx, req, resp)
}

// connect starts a runtime with a plugin.
func connect(t *testing.T, node Node) (*Runtime, *testPlugin) { return connectWith(t, node, "") }

// connectWith starts a runtime with a configuration of the default validator, and a plugin.
func connectWith(t *testing.T, node Node, validator string) (*Runtime, *testPlugin) {
	t.Helper()
	dir := t.TempDir()
	r, err := New(Config{
		Socket:              filepath.Join(dir, "nri/nri.sock"),
		PluginDir:           filepath.Join(dir, "plugins"),
		ConfigDir:           dir,
		Validator:           validator,
		RegistrationTimeout: 5 * time.Second,
		RequestTimeout:      time.Second,
		Log:                 slog.New(slog.DiscardHandler),
	})
	if err == nil {
		err = r.Start(node)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })

	p := &testPlugin{synced: make(chan int, 1), hang: make(chan struct{})}
	p.stub, err = stub.New(p, stub.WithSocketPath(r.cfg.Socket), stub.WithPluginName("test"), stub.WithPluginIdx("10"),
		stub.WithTTRPCOptions([]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(requestEviction)},
			[]ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(evict)}))
	if err == nil {
		err = p.stub.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stub.Stop)

	return r, p
}

// hold waits until the plugin is registered.
func hold(t *testing.T, r *Runtime) {
	t.Helper()
	release, err := r.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	release()
}

// TestRuntime relays events to a real plugin and carries out its requests.
func TestRuntime(t *testing.T) {
	node := &fakeNode{}
	r, p := connect(t, node)
	if got := <-p.synced; got != 1 {
		t.Errorf("Synchronize had %d containers, want 1", got)
	}
	hold(t, r)

	if info, err := os.Stat(r.cfg.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", info, err)
	}

	p.err = errors.New("rejected\x00by the plugin")
	err := r.Announce(t.Context(), RunPod, testPod(), nil)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "by the plugin") ||
		strings.ContainsRune(err.Error(), 0) {
		t.Errorf("a rejected pod: %v", err)
	}

	resp, err := r.Create(t.Context(), testPod(), testContainer())
	if err != nil || !slices.Equal(resp.Adjustment.NeedsShim(), []string{"environment (by plugin 10-test)"}) {
		t.Fatalf("the response is %+v, %v", resp, err)
	}
	if len(resp.Evictions) != 1 || resp.Evictions[0].ID != "response" {
		t.Errorf("evictions of the response: %v", resp.Evictions)
	}

	u := &api.ContainerUpdate{ContainerId: "c"}
	u.SetLinuxCPUShares(7)
	failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{u})
	if err != nil || len(failed) != 1 || failed[0].GetContainerId() != "c" {
		t.Errorf("failed updates: %v, %v", failed, err)
	}

	node.mu.Lock()
	defer node.mu.Unlock()
	if len(node.updates) != 2 || node.updates[0].Resources.GetCpuShares() != 5 ||
		node.updates[1].Resources.GetCpuShares() != 7 {
		t.Errorf("updates: %v", node.updates)
	}
	if len(node.evicted) != 1 || node.evicted[0].ID != "request" {
		t.Errorf("evictions of the request: %v", node.evicted)
	}
}

// TestHangingPlugin: NRI's library drops the plugin, and the event succeeds without it. If the
// caller gives up first, the error is the caller's.
func TestHangingPlugin(t *testing.T) {
	r, p := connect(t, &fakeNode{})
	defer close(p.hang)
	<-p.synced
	hold(t, r)

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Announce(ctx, Start, testPod(), testContainer()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller with less time: %v", err)
	}

	began := time.Now()
	for range 2 { // the second one without the plugin
		if err := r.Announce(t.Context(), Start, testPod(), testContainer()); err != nil {
			t.Errorf("Announce: %v", err)
		}
	}
	if took := time.Since(began); took < time.Second || took > 10*time.Second {
		t.Errorf("both events took %s, want the timeout of the plugin once", took)
	}
}

// BenchmarkNoPlugin measures the cost of a pod with one container without plugins: its events until
// it runs, and the files.
func BenchmarkNoPlugin(b *testing.B) {
	dir := b.TempDir()
	r, err := New(Config{
		Socket:              filepath.Join(dir, "nri.sock"),
		PluginDir:           filepath.Join(dir, "plugins"),
		RegistrationTimeout: time.Second,
		RequestTimeout:      time.Second,
		Log:                 slog.New(slog.DiscardHandler),
	})
	if err == nil {
		err = r.Start(&fakeNode{})
	}
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()

	store, err := OpenStore(filepath.Join(dir, "files"))
	if err != nil {
		b.Fatal(err)
	}

	pod, c := testPod(), testContainer()
	for b.Loop() {
		for _, e := range []Event{RunPod, "", Start, PostStart} {
			release, err := r.Hold(b.Context())
			if err != nil {
				b.Fatal(err)
			}

			switch e {
			case RunPod:
				err = errors.Join(r.Announce(b.Context(), e, pod, nil), store.Complete(pod.ID, nil))
			case "":
				_, err = r.Create(b.Context(), pod, c)
				err = errors.Join(err, r.Announce(b.Context(), PostCreate, pod, c), store.Complete(c.ID, nil))
			default:
				err = r.Announce(b.Context(), e, pod, c)
			}
			release()
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// TestHoldWaitsForTheStart: events before the start of plugins wait.
func TestHoldWaitsForTheStart(t *testing.T) {
	r, err := New(Config{
		RegistrationTimeout: time.Second,
		RequestTimeout:      time.Second,
		Log:                 slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := r.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Hold: %v, want the deadline of the caller", err)
	}
}

// TestProcessLimits: NRI's library drops the limit of processes from responses.
func TestProcessLimits(t *testing.T) {
	r, p := connect(t, &fakeNode{})
	<-p.synced
	hold(t, r)

	resp, err := r.Update(t.Context(), testPod(), testContainer(), &runtimeapi.LinuxContainerResources{CpuShares: 9})
	if err != nil || len(resp.Updates) != 1 {
		t.Fatalf("response %+v, %v", resp, err)
	}
	if u := resp.Updates[0]; u.Others.PidsLimit != 5 || u.Resources.GetCpuShares() != 9 || u.Problem != nil {
		t.Errorf("update %+v, want a process limit of 5 and CPU shares of 9", u)
	}

	e := &evictions{}
	for _, limit := range []int64{5, 5, 6} {
		u := &api.ContainerUpdate{ContainerId: "x"}
		u.SetLinuxPidLimits(limit)
		e.addUpdates([]*api.ContainerUpdate{u})
	}
	u := &api.ContainerUpdate{ContainerId: "x"}
	u.SetLinuxCPUShares(1)
	if _, err := e.complete([]*api.ContainerUpdate{u}); err == nil || !strings.Contains(err.Error(), "[5 6]") {
		t.Errorf("different limits: %v", err)
	}
}
