package view

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// partial is an engine with hanging or failing parts. Its containers are those of all.
type partial struct {
	mu      sync.Mutex // guards the fields below
	all     []model.ContainerID
	hanging map[model.ContainerID]bool // their inspects end with ctx
	failing map[string]error           // by the call: "images", "ping", "objects", "host"
	stuck   map[string]bool            // calls that end with ctx
	changed func(engine.Event)
	silent  bool           // events do not arrive
	history []engine.Event // remembered by the engine
	ended   chan error
	calls   map[string]int
}

func newPartial(ids ...model.ContainerID) *partial {
	return &partial{
		all:     ids,
		hanging: map[model.ContainerID]bool{},
		failing: map[string]error{},
		stuck:   map[string]bool{},
		calls:   map[string]int{},
	}
}

func (p *partial) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

func (p *partial) call(ctx context.Context, name string) error {
	p.mu.Lock()
	p.calls[name]++
	stuck, err := p.stuck[name], p.failing[name]
	p.mu.Unlock()
	if stuck {
		<-ctx.Done()
		return ctx.Err()
	}

	return err
}

func (p *partial) Host(ctx context.Context) (model.Host, error) {
	return model.Host{EngineVersion: "1"}, p.call(ctx, "host")
}

func (p *partial) TryShim(ctx context.Context) (model.Shim, error) {
	return model.Shim{}, p.call(ctx, "try shim")
}

func (p *partial) Ping(ctx context.Context) error { return p.call(ctx, "ping") }

func (p *partial) Images(ctx context.Context) ([]*model.Image, error) {
	return []*model.Image{{ID: "sha256:1"}}, p.call(ctx, "images")
}

// Image implements Source.
func (p *partial) Image(ctx context.Context, ref string) (*model.Image, error) {
	return &model.Image{ID: model.ImageID(ref), RepoTags: []string{"app:1"}}, p.call(ctx, "image")
}

// Objects takes as long as with a real engine: hanging objects are Unread, with the properties from
// the list.
func (p *partial) Objects(ctx context.Context) (out []model.Object, err error) {
	if err := p.call(ctx, "objects"); err != nil {
		return nil, err
	}

	p.mu.Lock()
	defer p.mu.Unlock()

	for _, id := range p.all {
		o := model.Object{Sandbox: &model.Sandbox{
			ID:        id,
			Running:   true,
			CreatedAt: time.Unix(1, 0),
			StartedAt: time.Unix(2, 0),
		}}
		if p.hanging[id] {
			o.Sandbox.Stale, o.Unread = true, id
		}

		out = append(out, o)
	}

	return out, nil
}

func (p *partial) Inspect(ctx context.Context, id model.ContainerID) (model.Object, error) {
	p.mu.Lock()
	p.calls["inspect "+string(id)]++
	hangs := p.hanging[id]
	p.mu.Unlock()
	if hangs {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // as with a real engine
		defer cancel()
		<-ctx.Done()
		return model.Object{}, ctx.Err()
	}

	return model.Object{Sandbox: &model.Sandbox{
		ID:        id,
		Name:      "read",
		Running:   true,
		CreatedAt: time.Unix(1, 0),
		StartedAt: time.Unix(2, 0),
	}}, nil
}

func (p *partial) Events(_ context.Context, changed func(engine.Event)) <-chan error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.changed, p.ended = changed, make(chan error, 1)
	return p.ended
}

// EventsBetween implements Source.
func (p *partial) EventsBetween(ctx context.Context, since, until time.Time) (out []engine.Event, err error) {
	if err := p.call(ctx, "events between"); err != nil {
		return nil, err
	}

	p.mu.Lock()
	defer p.mu.Unlock()

	for _, e := range p.history {
		if !e.At.Before(since) && e.At.Before(until) {
			out = append(out, e)
		}
	}

	return out, nil
}

// event sends an event to the view, unless the stream is silent.
func (p *partial) event(id model.ContainerID) {
	e := engine.Event{ID: id, Kind: engine.Changed, At: time.Now()}
	p.mu.Lock()
	changed, silent := p.changed, p.silent
	p.history = append(p.history, e)
	p.mu.Unlock()
	if !silent {
		changed(e)
	}
}

// follow runs a view of the engine until the end of the test.
func (p *partial) follow(t *testing.T) *View {
	t.Helper()
	v := New(p, discard)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = v.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return v
}

// count returns the number of kept events.
func (a *arrivals) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.events)
}

// connections returns the number of connections of the view.
func (p *partial) connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls["host"]
}

func isRead(v *View, id model.ContainerID) bool {
	sb, err := v.Sandbox(string(id))
	return err == nil && sb.Name == "read"
}

// TestHangingInspects: more containers hang than there are workers. The view is ready, shows them
// as listed, and reads the others at once.
func TestHangingInspects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ids []model.ContainerID
		for i := range 3 * workers {
			ids = append(ids, model.ContainerID(fmt.Sprint("hangs-", i)))
		}

		p := newPartial(append(ids, "good")...)
		for _, id := range ids {
			p.hanging[id] = true
		}

		v := p.follow(t)
		synctest.Wait()
		if e := v.Engine(); !e.Ready {
			t.Fatalf("engine state: %+v", e)
		}
		if sb, err := v.Sandbox("hangs-0"); err != nil || !sb.Stale || !sb.Running {
			t.Errorf("hanging container: %+v, %v", sb, err)
		}

		for _, id := range ids {
			p.event(id)
		}

		time.Sleep(slowInspect + time.Second)
		p.event("good")
		time.Sleep(2*slowInspect + time.Second)
		if !isRead(v, "good") {
			t.Error("the responsive container was not read")
		}
		if e := v.Engine(); !e.Ready {
			t.Errorf("engine state: %+v", e)
		}

		p.set(func() { clear(p.hanging) })
		time.Sleep(2 * retryMax)
		for _, id := range ids {
			if !isRead(v, id) {
				t.Errorf("%s was not read after it was responsive again", id)
			}
		}
	})
}

// TestFailedRefreshIsRetried: a failed read by a call consumes the request of an event. The
// container must be read later all the same.
func TestFailedRefreshIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPartial("one")
		v := p.follow(t)
		synctest.Wait()
		p.set(func() { p.hanging["one"] = true })
		p.event("one")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()

		if err := v.Refresh(ctx, "one"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Refresh of a hanging container: %v", err)
		}

		p.set(func() { clear(p.hanging) })
		time.Sleep(2 * retryMin)
		if !isRead(v, "one") {
			t.Error("the container is not read again")
		}
	})
}

// TestLastRecordStays: a container hanging at a resync keeps its earlier record.
func TestLastRecordStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPartial("one")
		v := p.follow(t)
		synctest.Wait()
		p.event("one")
		time.Sleep(time.Second)
		if !isRead(v, "one") {
			t.Fatal("not read")
		}

		p.set(func() { p.hanging["one"] = true })
		if err := v.Resync(t.Context()); err != nil {
			t.Fatal(err)
		}

		if sb, err := v.Sandbox("one"); err != nil || sb.Stale || sb.Name != "read" {
			t.Errorf("sandbox: %+v, %v", sb, err)
		}

		p.set(func() { clear(p.hanging) })
	})
}

// TestFailingImages: a failing or hanging list of images delays neither the start nor the workers,
// and is retried.
func TestFailingImages(t *testing.T) {
	for name, fail := range map[string]func(*partial, bool){
		"fails": func(p *partial, on bool) {
			p.failing["images"] = nil
			if on {
				p.failing["images"] = errdefs.ErrInternal
			}
		},
		"hangs": func(p *partial, on bool) { p.stuck["images"] = on },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPartial("one")
				fail(p, true)
				v := p.follow(t)
				time.Sleep(2 * imagesTimeout)
				if e := v.Engine(); !e.Ready {
					t.Fatalf("engine state: %+v", e)
				}
				if images, err := v.Images(); !errdefs.IsUnavailable(err) {
					t.Errorf("images before the first list: %v, %v", images, err)
				}

				if i, err := v.RefreshImage(t.Context(), "sha256:2"); err != nil || i.ID != "sha256:2" {
					t.Errorf("one image: %v, %v", i, err)
				}

				if i, err := v.Image("app:1"); err != nil || i.ID != "sha256:2" {
					t.Errorf("one image, from memory: %v, %v", i, err)
				}

				p.event("one")
				time.Sleep(time.Second)
				if !isRead(v, "one") {
					t.Error("containers are not read")
				}

				p.set(func() { fail(p, false) })
				time.Sleep(imagesRetryTimeout + 16*retryMin)
				if images, err := v.Images(); err != nil || len(images) != 1 {
					t.Error("the images were not read again")
				}
			})
		})
	}
}

// TestHeartbeat: a hanging engine is detected within 20 s, and its return within 5 s.
func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPartial("one")
		v := p.follow(t)
		synctest.Wait()
		time.Sleep(time.Minute)
		if e := v.Engine(); !e.Ready {
			t.Fatalf("before the outage: %+v", e)
		}

		p.set(func() { p.stuck["ping"], p.stuck["host"] = true, true })
		time.Sleep(20 * time.Second)
		if e := v.Engine(); e.Ready || e.Reason == "" {
			t.Errorf("20 s after the engine has stopped: %+v", e)
		}

		p.set(func() { clear(p.stuck) })
		// unlike with a real engine, a hanging call never ends by itself
		time.Sleep(hostTimeout + backoffMax + time.Second)
		if e := v.Engine(); !e.Ready {
			t.Errorf("after the engine has recovered: %+v", e)
		}
	})
}

// TestSilentStream: a remembered event not received by the view causes a reconnect within 30 s.
// Received events, even late ones, and failed checks do not.
func TestSilentStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPartial("one")
		v := p.follow(t)
		synctest.Wait()
		for range 20 {
			p.event("one")
			time.Sleep(3 * time.Second)
		}

		p.set(func() { p.failing["events between"] = errdefs.ErrUnavailable })
		for range 100 {
			p.event("one")
			time.Sleep(3 * time.Second)
		}

		if n := v.arrived.count(); n > int(maxUnchecked/(3*time.Second))+10 {
			t.Errorf("%d events are kept for an unresponsive engine", n)
		}

		p.set(func() { clear(p.failing) })
		if p.connections() != 1 {
			t.Fatalf("a working stream was connected %d times", p.connections())
		}

		p.set(func() { p.silent = true })
		p.event("one")
		changed := v.Changed()
		time.Sleep(30 * time.Second)
		select {
		case <-changed:
			t.Error("the runtime was not ready meanwhile")
		default:
		}

		if p.connections() != 2 || !v.Engine().Ready {
			t.Errorf("a silent stream was connected %d times: %+v", p.connections(), v.Engine())
		}

		time.Sleep(time.Minute)
		if p.connections() != 2 {
			t.Errorf("known missed events caused a reconnect (%d connections)", p.connections())
		}
	})
}

// TestImageOfAnEvent: names of images built, pulled or removed by others are current at once, while
// the list of all images hangs. An event of several images reads no single one.
func TestImageOfAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPartial("one")
		p.stuck["images"] = true
		v := p.follow(t)
		time.Sleep(2 * imagesTimeout)

		p.set(func() { go p.changed(engine.Event{Image: true}) })
		time.Sleep(time.Second)
		if i, err := v.Image("app:1"); !errdefs.IsNotFound(err) {
			t.Errorf("before the event: %v, %v", i, err)
		}

		id := "sha256:" + strings.Repeat("2", 64)
		p.set(func() { go p.changed(engine.Event{Image: true, ImageRef: id}) })
		time.Sleep(time.Second)
		if i, err := v.Image("app:1"); err != nil || string(i.ID) != id {
			t.Errorf("after the event: %v, %v", i, err)
		}

		p.set(func() {
			p.failing["image"] = errdefs.ErrNotFound
			go p.changed(engine.Event{Image: true, ImageRef: id})
		})
		time.Sleep(time.Second)
		if i, err := v.Image("app:1"); !errdefs.IsNotFound(err) {
			t.Errorf("after the removal: %v, %v", i, err)
		}
	})
}

// TestReadyImpliesWorkers fails each part of the view in turn. Afterwards the view is down, or all
// parts work.
func TestReadyImpliesWorkers(t *testing.T) {
	errNoEngine := errors.Join(errors.New("no engine"), errdefs.ErrUnavailable)
	for name, fail := range map[string]func(*partial){
		"event stream": func(p *partial) { p.ended <- nil },
		"heartbeat":    func(p *partial) { p.failing["ping"] = errNoEngine },
		"images": func(p *partial) {
			p.failing["images"] = errNoEngine
			go p.changed(engine.Event{Image: true})
		},
		"resync": func(p *partial) {
			p.failing["objects"] = errNoEngine
			go p.changed(engine.Event{Missed: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPartial("one")
				v := p.follow(t)
				synctest.Wait()
				down := v.Changed()
				p.set(func() { fail(p) })
				select {
				case <-down:
				case <-time.After(20 * time.Second):
					t.Fatal("the view stays ready after the failure")
				}

				p.set(func() { clear(p.failing) })
				time.Sleep(2*backoffMax + time.Second)
				if e := v.Engine(); !e.Ready {
					t.Fatalf("engine state: %+v", e)
				}

				p.event("one")
				time.Sleep(time.Second)
				if !isRead(v, "one") {
					t.Error("the workers are not running")
				}
			})
		})
	}
}
