package view

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var discard = slog.New(slog.DiscardHandler)

// run runs a view until the test ends.
func run(t *testing.T, src Source) *View {
	t.Helper()
	v := New(src, discard)
	runView(t, v)
	return v
}

func runView(t *testing.T, v *View) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = v.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
}

func makePod(t *testing.T, f *enginetest.Fake, name string) string {
	t.Helper()
	c, err := translate.NewSandbox(&runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{
		Name:      name,
		Namespace: "default",
		Uid:       name,
	}}, translate.SandboxOptions{NetworkMode: "none"})
	if err != nil {
		t.Fatal(err)
	}

	id, err := f.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}

	return string(id)
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.NewTicker(2 * time.Millisecond); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestFollowsTheEngine(t *testing.T) {
	f := enginetest.NewFake("app:1")
	before := makePod(t, f, "before")
	v := run(t, f)
	<-v.Synced()
	if s := v.Engine(); !s.Ready || s.Host.EngineVersion == "" || s.Reason != "" {
		t.Errorf("state: %+v", s)
	}
	if _, err := v.Sandbox(before); err != nil {
		t.Errorf("existing pod: %v", err)
	}

	later := makePod(t, f, "later")
	eventually(t, "the new pod is in the view", func() bool { _, err := v.Sandbox(later); return err == nil })
	if err := f.Start(t.Context(), model.ContainerID(later)); err != nil {
		t.Fatal(err)
	}

	eventually(t, "it runs", func() bool { s, _ := v.Sandbox(later); return s.Running })
	f.Drop(model.ContainerID(before))
	eventually(t, "the removed pod is dropped", func() bool { return len(v.Sandboxes()) == 1 })
	if _, err := f.Pull(t.Context(), "other:2", nil); err != nil {
		t.Fatal(err)
	}

	eventually(t, "the new image is in the view", func() bool {
		_, err := v.Image("docker.io/library/other:2")
		return err == nil
	})
}

func TestRefreshReadsYourWrites(t *testing.T) {
	f := enginetest.NewFake()
	v := New(f, discard) // not run: only Refresh can update it
	id := makePod(t, f, "a")
	if err := v.Refresh(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}

	if _, err := v.Sandbox(id); err != nil {
		t.Error(err)
	}

	f.Drop(model.ContainerID(id))
	if err := v.Refresh(t.Context(), model.ContainerID(id)); err != nil {
		t.Errorf("refresh of a removed object: %v", err)
	}

	if _, err := v.Sandbox(id); !errdefs.IsNotFound(err) {
		t.Errorf("removed object: %v", err)
	}

	f.Fault = func(string, bool) error { return errors.New("broken") }
	if err := v.Refresh(t.Context(), model.ContainerID(id)); err == nil {
		t.Error("a failed refresh returned no error")
	}
}

// TestEngineCannotDescribeOne: an error for one container does not affect the others, and its read
// is retried.
func TestEngineCannotDescribeOne(t *testing.T) {
	f := enginetest.NewFake()
	var connections, refused atomic.Int32
	f.Fault = func(verb string, after bool) error {
		if verb == "host" && after {
			connections.Add(1)
		}
		if verb == "inspect" && after && refused.Add(1) == 1 {
			return fmt.Errorf("RWLayer is unexpectedly nil: %w", errdefs.ErrInternal)
		}
		return nil
	}

	v := run(t, f)
	<-v.Synced()
	id := makePod(t, f, "odd")
	eventually(t, "the container is read again", func() bool { _, err := v.Sandbox(id); return err == nil })
	if n := connections.Load(); n != 1 || refused.Load() < 2 || !v.Engine().Ready {
		t.Errorf("%d connections, %d refusals, %+v", n, refused.Load(), v.Engine())
	}
}

func TestEngineGoesAndComes(t *testing.T) {
	f := enginetest.NewFake()
	f.SetDown(true)
	v := run(t, f)
	eventually(t, "a reason", func() bool {
		s := v.Engine()
		return s.Attempted && !s.Ready && s.Reason != "not yet connected to Docker"
	})

	changed := v.Changed()
	f.SetDown(false)
	<-v.Synced()
	<-changed
	changed = v.Changed()
	if !v.Engine().Ready {
		t.Error("not ready after a full read")
	}

	f.SetDown(true)
	<-changed
	eventually(t, "not ready", func() bool { return !v.Engine().Ready })
	id := ""
	f.SetDown(false)
	<-v.Synced()
	id = makePod(t, f, "after")
	eventually(t, "events flow again", func() bool { _, err := v.Sandbox(id); return err == nil })
}

// TestOlderInspectionNeverWins stores results of inspections in a different order than they
// started.
func TestOlderInspectionNeverWins(t *testing.T) {
	s := newStore()
	first, everything, last := s.beginInspection(), s.beginInspection(), s.beginInspection()
	old, young := &model.Sandbox{ID: "a", Running: true}, &model.Sandbox{
		ID:      "a",
		Running: true,
		Labels:  map[string]string{"young": ""},
	}

	s.put("a", model.Object{Sandbox: young}, last)
	s.put("a", model.Object{Sandbox: old}, first)
	if s.object("a").Sandbox != young {
		t.Error("an older inspection won")
	}

	s.replace(nil, everything) // a list started before the inspection
	if s.object("a").Sandbox != young {
		t.Error("an older list removed the result of a later inspection")
	}

	ended := &model.Sandbox{ID: "a"}
	s.put("a", model.Object{Sandbox: ended}, first)
	if s.object("a").Sandbox != ended {
		t.Error("a long inspection with the exit was dropped")
	}

	late := s.beginInspection()
	s.replace(nil, s.beginInspection())
	s.put("a", model.Object{Sandbox: ended}, late)
	if s.object("a").Sandbox != nil {
		t.Error("an older inspection restored a removed object")
	}

	s.replace(nil, s.beginInspection())
	if len(s.entries) != 0 {
		t.Errorf("entries of removed objects remain: %v", s.entries)
	}
}

func TestLookup(t *testing.T) {
	v := New(nil, discard)
	for i, id := range []string{"aaaa11", "aaaa22", "bbbb11"} {
		v.store.put(model.ContainerID(id),
			model.Object{Sandbox: &model.Sandbox{ID: model.ContainerID(id), CreatedAt: time.Unix(int64(i), 0)}}, 1)
		v.store.put(model.ContainerID("c"+id), model.Object{Container: &model.Container{
			ID:        model.ContainerID("c" + id),
			SandboxID: model.ContainerID(id),
			CreatedAt: time.Unix(5, 0),
		}}, 1)
	}

	for id, want := range map[string]string{"aaaa11": "aaaa11", "aaaa2": "aaaa22", "b": "bbbb11"} {
		t.Run(id, func(t *testing.T) {
			if s, err := v.Sandbox(id); err != nil || string(s.ID) != want {
				t.Errorf("sandbox %s: %v, %v", id, s, err)
			}
		})
	}

	if _, err := v.Sandbox("aaaa"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an ambiguous prefix: %v", err)
	}

	for _, id := range []string{"", "x", "caaaa11"} {
		if _, err := v.Sandbox(id); !errdefs.IsNotFound(err) {
			t.Errorf("sandbox %q: %v", id, err)
		}
	}

	got := ""
	for _, s := range v.Sandboxes() {
		got += string(s.ID) + " "
	}

	if got != "bbbb11 aaaa22 aaaa11 " {
		t.Errorf("not newest first: %s", got)
	}
	if c := v.ContainersOf("aaaa22"); len(c) != 1 || c[0].ID != "caaaa22" {
		t.Errorf("containers of a sandbox: %v", c)
	}
	if c := v.Containers(); fmt.Sprint(c[0].ID, c[1].ID) != "caaaa11caaaa22" {
		t.Errorf("containers created at the same time are not sorted by ID: %v", c)
	}
}

// down is a source without a working engine.
type down struct{ tries int }

func (d *down) Host(context.Context) (model.Host, error) {
	d.tries++
	return model.Host{}, errdefs.ErrUnavailable
}
func (*down) TryShim(context.Context) (model.Shim, error) { return model.Shim{}, nil }
func (*down) Ping(context.Context) error                  { return nil }
func (*down) EventsBetween(context.Context, time.Time, time.Time) ([]engine.Event, error) {
	return nil, nil
}
func (*down) Objects(context.Context) ([]model.Object, error) { return nil, nil }
func (*down) Inspect(context.Context, model.ContainerID) (model.Object, error) {
	return model.Object{}, nil
}
func (*down) Images(context.Context) ([]*model.Image, error)              { return nil, nil }
func (*down) Image(context.Context, string) (*model.Image, error)         { return nil, errdefs.ErrNotFound }
func (*down) Events(context.Context, func(engine.Event)) (_ <-chan error) { return nil }

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &down{}
		ctx, cancel := context.WithCancel(t.Context())
		v := New(d, discard)
		ended := make(chan struct{})
		go func() { defer close(ended); _ = v.Run(ctx) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		if d.tries < 30 || d.tries > 40 {
			t.Errorf("%d tries in a minute, want about one in two seconds", d.tries)
		}

		cancel()
		<-ended
	})
}
