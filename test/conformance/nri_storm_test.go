package conformance

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	nriContainers = flag.Int("nri-containers", 60, "containers of TestNRISynchronize")
	nriRestarts   = flag.Int("nri-restarts", 6, "restarts of the plugin in TestNRISynchronize")
)

// created is a container of the storm, and the end of its creation.
type created struct {
	id string
	at time.Time
}

// storm creates containers in several pods at once.
type storm struct {
	mu   sync.Mutex
	done []created
}

func (s *storm) all() []created {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.done)
}

// run creates containers in pods, by their IDs, and returns after the last one.
func (s *storm) run(t *testing.T, n *node, pods map[string]*runtimeapi.PodSandboxConfig, containers int) {
	var g sync.WaitGroup
	for pod, cfg := range pods {
		g.Go(func() {
			for i := range containers / len(pods) {
				cc := n.containerConfig(sh("true"))
				cc.Metadata.Name = fmt.Sprintf("c%d", i)
				r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
					PodSandboxId:  pod,
					Config:        cc,
					SandboxConfig: cfg,
				})
				if err != nil {
					t.Errorf("CreateContainer: %v", err)
					return
				}

				s.mu.Lock()
				s.done = append(s.done, created{r.ContainerId, time.Now()})
				s.mu.Unlock()
			}
		})
	}

	g.Wait()
}

// assertComplete checks that a plugin has each container once, of those created until a time.
func (p *plugin) assertComplete(t *testing.T, all []created, until time.Time) (synchronized, announced int) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()

	seen := map[string]int{}
	for _, c := range p.containers {
		seen[c.GetId()]++
		synchronized++
	}
	for _, e := range p.events {
		if e.name == "CreateContainer" {
			seen[e.container.GetId()]++
			announced++
		}
	}

	for id, times := range seen {
		if times != 1 {
			t.Errorf("container %s reached the plugin %d times", id, times)
		}
	}

	for _, c := range all {
		if c.at.Before(until) && seen[c.id] == 0 {
			t.Errorf("container %s was lost", c.id)
		}
	}

	return synchronized, announced
}

// TestNRISynchronize restarts a plugin while containers are created. Each instance has each
// container once: in Synchronize, or as an event.
func TestNRISynchronize(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		pods := map[string]*runtimeapi.PodSandboxConfig{}
		for range 4 {
			cfg := n.podConfig(t)
			pods[n.runPod(t, cfg)] = cfg
		}

		var s storm
		ended := make(chan struct{})
		go func() { defer close(ended); s.run(t, n, pods, *nriContainers) }()

		// Half of a restart's share of events, two for each container. Connections take the rest.
		wait := max(4, *nriContainers / *nriRestarts)
		synchronized, announced := 0, 0
		for range *nriRestarts {
			p := newPlugin(10, "storm").connect(t, n)
			for len(p.all("")) < wait {
				select {
				case <-ended:
				case <-time.After(10 * time.Millisecond):
					continue
				}
				break
			}

			until := time.Now()
			time.Sleep(10 * time.Millisecond)
			p.stub.Stop()
			a, b := p.assertComplete(t, s.all(), until)
			synchronized, announced = synchronized+a, announced+b
		}

		last := newPlugin(10, "storm").connect(t, n)
		<-ended
		last.assertComplete(t, s.all(), time.Now())
		if synchronized == 0 || announced == 0 {
			t.Errorf("%d containers in Synchronize and %d events: the storm had no overlap", synchronized, announced)
		}
		if got := len(s.all()); got != *nriContainers/len(pods)*len(pods) {
			t.Errorf("%d containers were created, want %d", got, *nriContainers)
		}
		t.Logf("%d containers: %d times in Synchronize, %d times as an event", len(s.all()), synchronized, announced)
	})
}

// TestNRIKilledDaemon kills the daemon while a plugin handles a new object. The next daemon never
// shows the object and removes it, and the kubelet's retry succeeds.
func TestNRIKilledDaemon(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		n.killIn(t, "RunPodSandbox", func(ctx context.Context) {
			_, _ = n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
		})
		eventually(t, "removal of the unfinished pod", func() bool { return n.docker(t, "ps", "-aq") == "" })

		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		n.killIn(t, "CreateContainer", func(ctx context.Context) {
			_, _ = n.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod,
				Config:        cc,
				SandboxConfig: cfg,
			})
		})
		eventually(t, "removal of the unfinished container", func() bool {
			return len(strings.Fields(n.docker(t, "ps", "-aq"))) == 1
		})

		p := newPlugin(10, "next").connect(t, n)
		p.mu.Lock()
		pods, containers := len(p.pods), len(p.containers)
		p.mu.Unlock()
		if pods != 1 || containers != 0 {
			t.Errorf("a plugin of the next daemon has %d pods and %d containers, want 1 and 0", pods, containers)
		}

		n.startConfig(t, pod, cfg, cc)
		n.stopPod(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		n.assertNoAdjustments(t)
	}, "--nri-plugin-request-timeout=1m")
}

// killIn kills the daemon while a plugin handles an event of a call, and starts the next one. It
// checks that no list has an object without its plugins.
func (n *node) killIn(t *testing.T, event string, call func(context.Context)) {
	t.Helper()
	reached, end := make(chan struct{}), make(chan struct{})
	hang := func(name string) {
		if name == event {
			close(reached)
			<-end
		}
	}
	p := newPlugin(10, "killer")
	p.onEvent = func(name string, _ *api.PodSandbox, _ *api.Container) error { hang(name); return nil }
	p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		hang("CreateContainer")
		return nil, nil, nil
	}
	p.connect(t, n)
	before := len(n.listed(t))

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); call(ctx) }()
	<-reached
	n.Kill(t)
	cancel()
	<-ended
	close(end)

	n.Restart(t)
	if got := n.listed(t); len(got) != before {
		t.Errorf("listed after %s was interrupted: %q, want %d", event, got, before)
	}
}

// listed returns the IDs of all pods and containers.
func (n *node) listed(t *testing.T) (ids []string) {
	t.Helper()
	pods, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}

	containers, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, p := range pods.Items {
		ids = append(ids, p.Id)
	}
	for _, c := range containers.Containers {
		ids = append(ids, c.Id)
	}

	return ids
}
