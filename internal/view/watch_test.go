package view

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
)

func word(k runtimeapi.ContainerEventType) string {
	return strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(k.String(), "CONTAINER_"), "_EVENT"))
}

// expect takes changes from a watch and fails on any others: "created started" of one ID.
func expect(t *testing.T, w *Watch, id, kinds string) []*Change {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	var out []*Change
	for i, want := range strings.Fields(kinds) {
		c, err := w.Next(ctx)
		if err != nil || string(c.ID) != id || word(c.Type) != want {
			t.Fatalf("change %d of %s: want %s, got %+v, %v", i, id, want, c, err)
		}

		if i > 0 && !c.At.After(out[i-1].At) {
			t.Errorf("%s is reported at %s, the previous change at %s", want, c.At, out[i-1].At)
		}

		out = append(out, c)
	}

	return out
}

// watching runs a view on a fake engine and watches it.
func watching(t *testing.T, f *enginetest.Fake) (*View, *Watch) {
	t.Helper()
	v := run(t, f)
	<-v.Synced()
	w := v.Watch()
	t.Cleanup(w.Stop)
	return v, w
}

func TestWatchLifecycle(t *testing.T) {
	f := enginetest.NewFake()
	_, w := watching(t, f)
	id := makePod(t, f, "a")
	expect(t, w, id, "created")
	if err := f.Start(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}

	c := expect(t, w, id, "started")[0]
	if !c.Sandbox.Running || !c.At.Equal(c.Sandbox.StartedAt) {
		t.Errorf("started at %s: %+v", c.At, c.Sandbox)
	}

	f.End(model.ContainerID(id), 3)
	c = expect(t, w, id, "stopped")[0]
	if c.Sandbox.Running || c.Sandbox.ExitCode != 3 || !c.At.Equal(c.Sandbox.FinishedAt) {
		t.Errorf("stopped at %s: %+v", c.At, c.Sandbox)
	}

	f.Drop(model.ContainerID(id))
	if c := expect(t, w, id, "deleted")[0]; c.Sandbox == nil || string(c.Sandbox.ID) != id {
		t.Errorf("deleted: %+v", c)
	}
}

// TestWatchWhileTheEngineIsAway: changes during an outage of the engine are published once it is
// back, each once.
func TestWatchWhileTheEngineIsAway(t *testing.T) {
	f := enginetest.NewFake()
	var ids []string
	for _, name := range []string{"untouched", "ends", "goes"} {
		id := makePod(t, f, name)
		if err := f.Start(t.Context(), model.ContainerID(id)); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}

	v, w := watching(t, f)
	f.SetDown(true)
	eventually(t, "not ready", func() bool { return !v.Engine().Ready })
	f.End(model.ContainerID(ids[1]), 1)
	f.Drop(model.ContainerID(ids[2]))
	f.SetDown(false)
	<-v.Synced()
	expect(t, w, ids[1], "stopped")
	expect(t, w, ids[2], "stopped deleted")
	next := makePod(t, f, "next")
	expect(t, w, next, "created")
}

// TestWatchBeforeFirstRead: a watch started before the first read reports all objects as new.
func TestWatchBeforeFirstRead(t *testing.T) {
	f := enginetest.NewFake()
	id := makePod(t, f, "a")
	if err := f.Start(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}

	v := New(f, discard)
	w := v.Watch()
	defer w.Stop()

	if err := v.readAll(t.Context(), resyncConnect); err != nil {
		t.Fatal(err)
	}

	if err := v.readAll(t.Context(), resyncConnect); err != nil {
		t.Fatal(err)
	}

	expect(t, w, id, "created started")
	if len(w.changes) != 0 {
		t.Errorf("%d more changes after a second read", len(w.changes))
	}
}

// TestRemovedPodIsPublished: a pod missing from a full read is removed container by container, each
// with its sandbox.
func TestRemovedPodIsPublished(t *testing.T) {
	v := New(nil, discard)
	w := v.Watch()
	defer w.Stop()

	s := &model.Sandbox{ID: "s", CreatedAt: time.Unix(1, 0), StartedAt: time.Unix(2, 0), Running: true}
	c := &model.Container{ID: "c", SandboxID: "s", CreatedAt: time.Unix(3, 0)}
	v.publishLocked(v.store.replace([]model.Object{{Container: c}, {Sandbox: s}}, v.beginInspection()))
	expect(t, w, "s", "created started")
	if got := expect(t, w, "c", "created")[0]; got.Sandbox != s || len(got.Containers) != 1 {
		t.Errorf("change: %+v", got)
	}

	v.publishLocked(v.store.replace(nil, v.beginInspection()))
	if got := expect(t, w, "c", "deleted")[0]; got.Sandbox != s || len(got.Containers) != 0 {
		t.Errorf("change: %+v", got)
	}

	expect(t, w, "s", "stopped deleted")
}

// TestMissedRestarts: the engine may restart a container several times between two inspections.
func TestMissedRestarts(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	running, over := runtimeapi.ContainerState_CONTAINER_RUNNING, runtimeapi.ContainerState_CONTAINER_EXITED
	v := New(nil, discard)
	w := v.Watch()
	defer w.Stop()

	for _, c := range []model.Container{
		{State: running, CreatedAt: at(1), StartedAt: at(2)},
		{State: running, CreatedAt: at(1), StartedAt: at(4)},
		{State: over, CreatedAt: at(1), StartedAt: at(6), FinishedAt: at(7)},
		{State: over, CreatedAt: at(1), StartedAt: at(8), FinishedAt: at(9)},
	} {
		c.ID = "c"
		v.publishLocked(v.store.put("c", model.Object{Container: &c}, v.beginInspection()))
	}

	expect(t, w, "c", "created started stopped started stopped started stopped started stopped")
}

// TestStartThatFailed: a container with a failed start has exited without a start.
func TestStartThatFailed(t *testing.T) {
	v := New(nil, discard)
	w := v.Watch()
	defer w.Stop()

	c := model.Container{ID: "c", CreatedAt: time.Unix(1, 0)}
	v.publishLocked(v.store.put("c", model.Object{Container: &c}, v.beginInspection()))
	failed := c
	failed.State, failed.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, time.Unix(1, 0)
	v.publishLocked(v.store.put("c", model.Object{Container: &failed}, v.beginInspection()))
	v.publishLocked(v.store.remove("c", time.Unix(3, 0)))
	expect(t, w, "c", "created stopped deleted")
}

// fakeEngine is an engine with one container. Inspections finish in a different order than they
// started, events arrive late but in order.
type fakeEngine struct {
	v           *View
	at          int            // index of the next kind
	events      []engine.Event // not delivered yet
	inspections []*inspection  // in progress
	kinds       []string
}

func (m *fakeEngine) advance() {
	if m.at == len(m.kinds) {
		return
	}

	m.at++
	e := engine.Event{ID: "c", At: time.Unix(int64(m.at), 0)}
	switch m.kinds[m.at-1] {
	case "started":
		e.Kind = engine.Started
	case "stopped":
		e.Kind = engine.Died
	case "deleted":
		e.Kind = engine.Destroyed
	}

	m.events = append(m.events, e)
}

func (m *fakeEngine) deliver() {
	if len(m.events) > 0 {
		m.v.observe(m.events[0])
		m.events = m.events[1:]
	}
}

// record returns the current container, nil after its removal. The engine reports starts and exits
// a little later than it records them.
func (m *fakeEngine) record() *model.Container {
	c := &model.Container{ID: "c", SandboxID: "s"}
	for i, k := range m.kinds[:m.at] {
		at := time.Unix(int64(i+1), 0).Add(-time.Millisecond)
		switch k {
		case "created":
			c.CreatedAt = at
		case "started":
			c.StartedAt, c.State = at, runtimeapi.ContainerState_CONTAINER_RUNNING
		case "stopped":
			c.FinishedAt, c.State = at, runtimeapi.ContainerState_CONTAINER_EXITED
		case "deleted":
			return nil
		}
	}

	return c
}

// begin starts an inspection of the container or a full read.
func (m *fakeEngine) begin(everything bool) {
	m.inspections = append(m.inspections, &inspection{ticket: m.v.beginInspection(), everything: everything})
}

// finish advances a random inspection by one step: the engine answers, then the answer arrives.
func (m *fakeEngine) finish(r *rand.Rand) {
	if len(m.inspections) == 0 {
		return
	}

	i := r.IntN(len(m.inspections))
	l := m.inspections[i]
	if !l.answered {
		l.found, l.answered = m.record(), true
		return
	}

	m.inspections = slices.Delete(m.inspections, i, i+1)
	o := model.Object{Container: l.found}
	switch {
	case !l.everything:
		m.v.publishLocked(m.v.store.put("c", o, l.ticket))
	case l.found == nil:
		m.v.publishLocked(m.v.store.replace(nil, l.ticket))
	default:
		m.v.publishLocked(m.v.store.replace([]model.Object{o}, l.ticket))
	}
}

// finishAll ends all inspections.
func (m *fakeEngine) finishAll(r *rand.Rand) {
	for len(m.inspections) > 0 {
		m.finish(r)
	}
}

// inspection is an inspection in progress.
type inspection struct {
	ticket     uint64
	everything bool
	answered   bool
	found      *model.Container
}

// TestEveryInterleaving runs inspections, events and the lifecycle itself in thousands of orders. A
// container seen once is published from its creation to its removal, each transition once, with any
// number of missed states in between.
func TestEveryInterleaving(t *testing.T) {
	for seed := range uint64(5000) {
		r := rand.New(rand.NewPCG(seed, 1))
		kinds := []string{"created", "started", "stopped", "deleted"}
		if seed%4 == 0 {
			kinds = []string{"created", "deleted"} // never started
		}

		v := New(nil, discard)
		w := v.Watch()
		m := &fakeEngine{v: v, kinds: kinds}
		m.advance()
		m.begin(false)
		m.finishAll(r) // CreateContainer has inspected when it returns
		for range r.IntN(40) {
			switch r.IntN(4) {
			case 0:
				m.advance()
			case 1:
				m.deliver()
			case 2:
				m.begin(false)
			case 3:
				m.finish(r)
			}

			// A published change is never revoked.
			if c := v.store.object("c").Container; len(w.changes) > 1 && c != nil && c.StartedAt.IsZero() ||
				len(w.changes) > 2 && c != nil && c.State != runtimeapi.ContainerState_CONTAINER_EXITED {
				t.Fatalf("seed %d: %d changes were published, the record is %+v", seed, len(w.changes), c)
			}
		}

		for m.at < len(m.kinds) || len(m.events) > 0 || len(m.inspections) > 0 {
			m.advance()
			m.finish(r)
			m.deliver()
		}

		var got []string
		for len(w.changes) > 0 {
			got = append(got, word((<-w.changes).Type))
		}

		if w.Stop(); !slices.Equal(got, kinds) {
			t.Fatalf("seed %d: published %v, want %v", seed, got, kinds)
		}

		for id, e := range v.store.entries {
			if !isEmpty(e.object) || e.removing != nil || e.fromEvent || e.pending != (exitReason{}) {
				t.Fatalf("seed %d: %s was removed, its entry is %+v", seed, id, e)
			}
		}
	}
}

// TestDroppedEvents: without the engine's events a full read publishes the missed transitions, each
// once.
func TestDroppedEvents(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 2))
		v := New(nil, discard)
		w := v.Watch()
		m := &fakeEngine{v: v, kinds: []string{"created", "started", "stopped", "deleted"}}
		for range 30 {
			if r.IntN(3) == 0 {
				m.advance()
			}

			everything := r.IntN(3) == 0
			if everything {
				m.finishAll(r) // no inspection overlaps two full reads
			}

			m.begin(everything)
			if r.IntN(2) == 0 {
				m.finish(r)
			}
		}

		for m.at < 4 {
			m.advance()
		}

		m.begin(true)
		m.finishAll(r)
		m.begin(true)
		m.finishAll(r)
		var got []string
		for len(w.changes) > 0 {
			got = append(got, word((<-w.changes).Type))
		}

		// A container not seen running and without events is published without a run.
		if w.Stop(); len(got) > 0 && !slices.Equal(got, m.kinds) && !slices.Equal(got, []string{"created", "deleted"}) {
			t.Fatalf("seed %d: published %v", seed, got)
		}
	}
}

func TestSlowReader(t *testing.T) {
	v := New(nil, discard)
	slow, quick := v.Watch(), v.Watch()
	defer slow.Stop()
	defer quick.Stop()

	for i := range watchBuffer + 10 {
		v.publishLocked([]transition{{id: model.ContainerID(fmt.Sprint(i))}})
		if c, err := quick.Next(t.Context()); err != nil || string(c.ID) != fmt.Sprint(i) {
			t.Fatalf("the fast reader: %+v, %v", c, err)
		}
	}

	for i := range watchBuffer {
		if c, err := slow.Next(t.Context()); err != nil || string(c.ID) != fmt.Sprint(i) {
			t.Fatalf("change %d: %+v, %v", i, c, err)
		}
	}

	for range 2 {
		if _, err := slow.Next(t.Context()); !errdefs.IsResourceExhausted(err) {
			t.Errorf("after the buffered changes: %v", err)
		}
	}
}

func TestWatchEnds(t *testing.T) {
	f := enginetest.NewFake()
	v := New(f, discard)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = v.Run(ctx) }()
	<-v.Synced()
	w := v.Watch()
	defer w.Stop()

	canceled, leave := context.WithCancel(t.Context())
	leave()
	if _, err := w.Next(canceled); err != context.Canceled { //nolint:errorlint // the context's own
		t.Errorf("a canceled reader: %v", err)
	}

	cancel()
	if _, err := w.Next(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("when the view ends: %v", err)
	}

	<-ended
	late := v.Watch()
	if _, err := late.Next(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("after the view has ended: %v", err)
	}

	late.Stop()
	if len(v.watches) != 0 {
		t.Errorf("%d watches remain", len(v.watches))
	}
}

// TestLaterIsNewer: a kubelet drops states older than the last published one. An exit before that
// state, found after it, must still count as newer.
func TestLaterIsNewer(t *testing.T) {
	v := New(nil, discard)
	w := v.Watch()
	defer w.Stop()

	s := &model.Sandbox{ID: "s", CreatedAt: time.Unix(1, 0), StartedAt: time.Unix(2, 0), Running: true}
	v.publishLocked(v.store.put("s", model.Object{Sandbox: s}, v.beginInspection()))
	expect(t, w, "s", "created started")
	before := time.Now()
	status, err := v.Pod("s")
	if err != nil || status.At.Before(before) || time.Since(status.At) < 0 {
		t.Fatalf("pod: %+v, %v", status, err)
	}

	ended := *s
	ended.Running, ended.FinishedAt = false, before
	v.publishLocked(v.store.put("s", model.Object{Sandbox: &ended}, v.beginInspection()))
	c := expect(t, w, "s", "stopped")[0]
	if !c.At.After(status.At) || c.At.After(time.Now()) {
		t.Errorf("published with %s after a status of %s", c.At, status.At)
	}
	if again, err := v.Pod("s"); err != nil || !again.At.After(c.At) {
		t.Errorf("pod: %+v, %v", again, err)
	}

	if _, err := v.Pod("x"); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown pod: %v", err)
	}
}

// TestEventsWithoutInspections: the engine answers no inspection, as during its cleanup after an
// exit.
func TestEventsWithoutInspections(t *testing.T) {
	v := New(nil, discard)
	w := v.Watch()
	defer w.Stop()

	at := func(s int64) time.Time { return time.Unix(s, 0) }
	created := &model.Container{ID: "c", SandboxID: "s", CreatedAt: at(1)}
	v.publishLocked(v.store.put("c", model.Object{Container: created}, v.beginInspection()))
	for _, e := range []engine.Event{
		{
			ID:   "c",
			Kind: engine.Started,
			At:   at(2),
		}, {ID: "c", Kind: engine.OutOfMemory, At: at(3)}, {ID: "c", Kind: engine.Died, At: at(4), ExitCode: 137},
		{
			ID:   "other",
			Kind: engine.Started,
			At:   at(5),
		}, {ID: "other", Kind: engine.Died, At: at(6)}, {ID: "other", Kind: engine.Destroyed, At: at(7)},
	} {
		v.observe(e)
	}

	published := expect(t, w, "c", "created started stopped")
	for i, want := range []runtimeapi.ContainerState{runtimeapi.ContainerState_CONTAINER_CREATED,
		runtimeapi.ContainerState_CONTAINER_RUNNING, runtimeapi.ContainerState_CONTAINER_EXITED} {
		if c := published[i].Containers; len(c) != 1 || c[0].State != want {
			t.Errorf("containers at %s: %+v", published[i].Type, c)
		}
	}

	if c := published[2].Containers[0]; c.ExitCode != 137 || c.Reason != "OOMKilled" || !c.FinishedAt.Equal(at(4)) ||
		!c.StartedAt.Equal(at(2)) || !published[2].At.Equal(at(4)) {
		t.Errorf("%+v, published at %s", c, published[2].At)
	}

	if created.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Error("a shared record was modified")
	}

	exact := &model.Container{
		ID:         "c",
		SandboxID:  "s",
		CreatedAt:  at(1),
		StartedAt:  at(2).Add(-1),
		FinishedAt: at(4).Add(-1),
		State:      runtimeapi.ContainerState_CONTAINER_EXITED,
	}

	v.publishLocked(v.store.put("c", model.Object{Container: exact}, v.beginInspection()))
	if c, err := v.Container("c"); err != nil || c != exact || len(w.changes) != 0 {
		t.Errorf("after an inspection: %+v, %v, %d more changes", c, err, len(w.changes))
	}
}

// TestKilledMayBeOutOfMemory: Docker may report an out-of-memory after the exit caused by it. So an
// unrequested exit by SIGKILL waits for the inspection.
func TestKilledMayBeOutOfMemory(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	for asked, want := range map[bool]string{true: "created started stopped", false: "created started"} {
		v := New(nil, discard)
		w := v.Watch()
		v.publishLocked(v.store.put("c", model.Object{Container: &model.Container{ID: "c", CreatedAt: at(1)}},
			v.beginInspection()))
		v.observe(engine.Event{ID: "c", Kind: engine.Started, At: at(2)})
		if asked {
			v.observe(engine.Event{ID: "c", Kind: engine.Killed, At: at(3)})
		}

		v.observe(engine.Event{ID: "c", Kind: engine.Died, At: at(4), ExitCode: killedCode})
		expect(t, w, "c", want)
		if len(w.changes) != 0 {
			t.Errorf("requested: %v; published %s and more", asked, want)
		}

		w.Stop()
	}
}
