package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
)

// fakePlugins records events. fails, if set, rejects them by name.
type fakePlugins struct {
	gate  sync.RWMutex // the registration of a plugin, and holds
	mu    sync.Mutex   // guards the rest
	holds int
	names []string // event and ID
	fails func(event string) error
	stop  *nri.Response
	want  *nri.Response // of updates
}

func (p *fakePlugins) Hold(context.Context) (func(), error) {
	p.gate.RLock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.holds++

	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.holds--
		p.gate.RUnlock()
	}, nil
}

func (p *fakePlugins) record(event string, id model.ContainerID) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holds == 0 {
		return errors.New("an event without a hold")
	}
	p.names = append(p.names, event+" "+string(id))
	if p.fails == nil {
		return nil
	}

	return p.fails(event)
}

func (p *fakePlugins) Announce(_ context.Context, e nri.Event, pod nri.Pod, c *model.Container) error {
	if c == nil {
		return p.record(string(e), pod.ID)
	}
	return p.record(string(e), c.ID)
}

func (p *fakePlugins) UpdatePod(_ context.Context, pod nri.Pod, _, _ *runtimeapi.LinuxContainerResources) error {
	return p.record("UpdatePodSandbox", pod.ID)
}

func (p *fakePlugins) Create(_ context.Context, _ nri.Pod, c *model.Container) (*nri.Response, error) {
	return &nri.Response{}, p.record("CreateContainer", c.ID)
}

func (p *fakePlugins) Update(
	_ context.Context, _ nri.Pod, c *model.Container, _ *runtimeapi.LinuxContainerResources,
) (*nri.Response, error) {
	return p.want, p.record("UpdateContainer", c.ID)
}

func (p *fakePlugins) Stop(_ context.Context, _ nri.Pod, c *model.Container) (*nri.Response, error) {
	resp := &nri.Response{}
	if p.stop != nil {
		resp = p.stop
	}
	return resp, p.record("StopContainer", c.ID)
}

func (p *fakePlugins) State() nri.State { return nri.State{Started: true} }

// of returns the events of an object.
func (p *fakePlugins) of(id string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()

	var out []string
	for _, n := range p.names {
		if event, of, _ := strings.Cut(n, " "); of == id {
			out = append(out, event)
		}
	}

	return out
}

// newPluggedService returns a Service with plugins that run. engineNetNS is that of newServiceWith.
func newPluggedService(t *testing.T, engineNetNS string) (*Service, *world, *fakePlugins) {
	t.Helper()
	p := &fakePlugins{}
	s, w := newServiceFor(t, engineNetNS, p)
	ctx, cancel := context.WithCancel(context.Background())
	started, ended := make(chan nri.Node, 1), make(chan struct{})
	go func() {
		defer close(ended)
		if err := (PluginRunner{s}).Run(ctx, func(n nri.Node) error { started <- n; return nil }); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
	<-started

	return s, w, p
}

// TestPluginsFailAtEachStep breaks each step of a pod with plugins, those of the plugins among
// them. Nothing may remain, nothing unfinished may be visible, and plugins that have seen an object
// get its end.
func TestPluginsFailAtEachStep(t *testing.T) {
	s, w, p := newPluggedService(t, "by a flag") // a failed namespace is no failure otherwise
	p.fails = func(event string) error {
		if strings.HasPrefix(event, "Stop") || strings.HasPrefix(event, "Remove") || strings.HasPrefix(event, "Post") {
			return nil // logged
		}
		return w.fails(event)
	}

	for n := 1; ; n++ {
		cfg := w.pod()
		name := w.breakNth(n)
		err := s.startPlugged(t.Context(), cfg)
		step := name()
		if (step == "") != (err == nil) {
			t.Errorf("step %q failed, and the error is %v", step, err)
		}

		for _, sb := range s.View.Sandboxes() {
			if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
				PodSandboxId: string(sb.ID),
			}); err != nil {
				t.Errorf("RemovePodSandbox: %v", err)
			}
		}

		w.assertNoLeftovers(t, s)
		if ids := w.store.IDs(); len(ids) > 0 {
			t.Errorf("%s: %d files remain", step, len(ids))
		}
		wait(t, "the end of concealed objects", func() bool { return !w.view.HasConcealed() })

		if step == "" {
			if n < 12 {
				t.Errorf("only %d steps were broken", n-1)
			}
			break
		}
	}

	p.assertEnds(t)
}

// TestPluginsCannotKeepAPod expects a pod to end although plugins fail at each stop and removal.
// Each event comes once.
func TestPluginsCannotKeepAPod(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	p.fails = func(event string) error {
		if strings.HasPrefix(event, "Stop") || strings.HasPrefix(event, "Remove") {
			return errors.New("broken")
		}
		return nil
	}

	if err := s.startPlugged(t.Context(), w.pod()); err != nil {
		t.Fatal(err)
	}

	pod := string(s.View.Sandboxes()[0].ID)
	_, stopErr := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{
		ContainerId: string(s.View.Containers()[0].ID),
	})
	_, podErr := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
	_, removeErr := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
	if err := errors.Join(stopErr, podErr, removeErr); err != nil {
		t.Error(err)
	}

	p.assertEnds(t)
}

// startPlugged runs a pod with one container.
func (s *Service) startPlugged(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) error {
	pod, err := s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return err
	}

	c, err := s.CreateContainer(ctx, createRequest(pod.PodSandboxId, cfg))
	if err != nil {
		return err
	}

	_, err = s.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})

	return err
}

// assertEnds checks that each object was stopped and removed, once and last.
func (p *fakePlugins) assertEnds(t *testing.T) {
	t.Helper()
	ids := map[string]bool{}
	for _, n := range p.names {
		_, id, _ := strings.Cut(n, " ")
		ids[id] = true
	}

	for id := range ids {
		events := p.of(id)
		ends := slices.DeleteFunc(slices.Clone(events), func(e string) bool {
			return !strings.HasPrefix(e, "Stop") && !strings.HasPrefix(e, "Remove")
		})
		if len(ends) != 2 || !slices.Equal(ends, events[len(events)-2:]) || !strings.HasPrefix(ends[0], "Stop") {
			t.Errorf("events of %s: %q", id, events)
		}
	}
}

// TestPluginsLearnOfExits: a container that ends by itself, and one that somebody else removes.
func TestPluginsLearnOfExits(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err == nil {
		_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	}
	if err == nil {
		err = w.engine.Stop(t.Context(), model.ContainerID(c.ContainerId), 0)
	}
	if err != nil {
		t.Fatal(err)
	}

	wait(t, "StopContainer", func() bool { return slices.Contains(p.of(c.ContainerId), "StopContainer") })
	if err := w.engine.Remove(t.Context(), model.ContainerID(c.ContainerId)); err != nil {
		t.Fatal(err)
	}
	wait(t, "RemoveContainer", func() bool { return slices.Contains(p.of(c.ContainerId), "RemoveContainer") })

	want := []string{"CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "StopContainer",
		"RemoveContainer"}
	if diff := cmp.Diff(want, p.of(c.ContainerId)); diff != "" {
		t.Error(diff)
	}
}

// TestPluginsLearnOfALateStart: the engine starts a container although the call has failed.
func TestPluginsLearnOfALateStart(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	w.breakOnce("start, after")
	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err == nil {
		t.Error("StartContainer succeeded")
	}
	w.setFault(nil)

	for range 2 {
		if err := (completer{s}).completeStart(t.Context(), model.ContainerID(c.ContainerId)); err != nil {
			t.Errorf("completeStart: %v", err)
		}
	}

	want := []string{"CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer"}
	if diff := cmp.Diff(want, p.of(c.ContainerId)); diff != "" {
		t.Error(diff)
	}
}

func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 1000 {
		if cond() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("timed out waiting for %s", what)
}

// TestPluginsChangeUpdates: the resources of plugins replace those of the request, updates of other
// containers follow, and evictions stop containers.
func TestPluginsChangeUpdates(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	var ids []model.ContainerID
	for i := range 3 {
		r := createRequest(pod, cfg)
		r.Config.Metadata.Name = fmt.Sprintf("c%d", i)
		c, err := s.CreateContainer(t.Context(), r)
		if err == nil {
			_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
		}
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, model.ContainerID(c.ContainerId))
	}

	shares := func(n int64) *runtimeapi.LinuxContainerResources {
		return &runtimeapi.LinuxContainerResources{CpuShares: n}
	}
	p.want = &nri.Response{
		Updates:   []nri.Update{{ID: ids[0], Resources: shares(300)}, {ID: ids[1], Resources: shares(400)}},
		Evictions: []nri.Eviction{{ID: ids[2], Reason: "test"}, {ID: "x"}},
	}
	if _, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: string(ids[0]),
		Linux:       shares(200),
	}); err != nil {
		t.Fatal(err)
	}

	has := func(id model.ContainerID, want int64) bool {
		c, err := s.View.Container(string(id))
		return err == nil && c.Resources.GetLinux().GetCpuShares() == want
	}
	if !has(ids[0], 300) {
		t.Error("the update of the plugins did not replace that of the request")
	}
	wait(t, "the update of another container", func() bool { return has(ids[1], 400) })
	wait(t, "the eviction", func() bool {
		c, err := s.View.Container(string(ids[2]))
		return err == nil && c.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})

	failed := s.hooks.Update(t.Context(), []nri.Update{
		{ID: ids[2], Resources: shares(1)}, {ID: ids[2], Resources: shares(1), IgnoreFailure: true},
		{ID: ids[1], Resources: shares(-1)}, {ID: ids[1], Problem: errBroken}, {ID: ids[1], Resources: shares(500)},
	}, nil)
	if len(failed) != 3 || !has(ids[1], 500) {
		t.Errorf("%d updates failed, want those of an ended container, of invalid and of impossible resources",
			len(failed))
	}
}

// TestSynchronizeHasEachObjectOnce creates pods while plugins register. Each registration has the
// objects of all earlier events, and no other.
func TestSynchronizeHasEachObjectOnce(t *testing.T) {
	s, w, p := newPluggedService(t, "")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 20 {
			if err := s.startPlugged(t.Context(), w.pod()); err != nil {
				t.Errorf("start: %v", err)
			}
		}
	}()

	for done := false; !done; {
		select {
		case <-ended:
			done = true
		case <-time.After(time.Millisecond):
		}

		p.gate.Lock() // a plugin registers
		want := map[string]bool{}
		for _, n := range p.names {
			if event, id, _ := strings.Cut(n, " "); event == "RunPodSandbox" || event == "CreateContainer" {
				want[id] = true
			}
		}

		got := map[string]bool{}
		for _, pod := range s.hooks.Objects() {
			got[string(pod.ID)] = true
			for _, c := range pod.Containers {
				got[string(c.ID)] = true
			}
		}
		p.gate.Unlock()

		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("Synchronize: %s", diff)
		}
	}
}
