// Package lives takes containers through their lives and listens meanwhile to the engine's events
// and to the CRI's (GetContainerEvents): was every transition told, in order, and how long after
// the engine told it.
package lives

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config says which lives.
type Config struct {
	Runtime runtimeapi.RuntimeServiceClient
	Docker  *client.Client
	Pod     string // a running sandbox
	PodOf   *runtimeapi.PodSandboxConfig
	// Container is one of that name, of an image with a shell.
	Container     func(name string, command []string) *runtimeapi.ContainerConfig
	Lives, AtOnce int
}

// Figures are what was seen.
type Figures struct {
	// Behind is how long after the engine's own time of its event each transition arrived.
	Behind map[runtimeapi.ContainerEventType][]time.Duration
	// lives of which something else was told than that they began and ended, in order
	Wrong []string
}

// actions are the engine's events by what they mean.
var actions = map[events.Action]runtimeapi.ContainerEventType{
	events.ActionCreate:  runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT,
	events.ActionStart:   runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	events.ActionDie:     runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT,
	events.ActionDestroy: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// wanted is every life.
var wanted = []runtimeapi.ContainerEventType{
	runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// told is what both streams have told.
type told struct {
	mu      sync.Mutex
	changed chan struct{} // closed and renewed with each event
	cri     map[string][]event
	engine  map[string]map[runtimeapi.ContainerEventType]time.Time
}

// event is one of the CRI's, when it came.
type event struct {
	kind runtimeapi.ContainerEventType
	at   time.Time
}

// Run takes containers through three kinds of lives in turn: one that ends by itself, one that is
// stopped, one that is removed while it runs.
func Run(ctx context.Context, c Config) (Figures, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	t := &told{
		changed: make(chan struct{}),
		cri:     map[string][]event{},
		engine:  map[string]map[runtimeapi.ContainerEventType]time.Time{},
	}

	var listening sync.WaitGroup
	defer listening.Wait()
	defer cancel()

	stream, err := c.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = stream.Header()
	}

	if err != nil {
		return Figures{}, err
	}

	fromEngine := c.Docker.Events(ctx, client.EventsListOptions{
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType)),
	})
	listening.Go(func() { t.listenEngine(ctx, fromEngine) })
	broken := make(chan error, 1)
	listening.Go(func() { broken <- t.listenCRI(stream) })

	ids := make([]string, c.Lives)
	g, lives := errgroup.WithContext(ctx)
	g.SetLimit(c.AtOnce)
	for i := range ids {
		g.Go(func() (err error) {
			ids[i], err = c.live(lives, t, i)
			return err
		})
	}

	if err := g.Wait(); err != nil {
		select {
		case other := <-broken:
			err = errors.Join(err, other)
		default:
		}
		return Figures{}, err
	}

	err = t.complete(ctx, ids)

	return t.figures(ids), err
}

// complete waits for the engine's events, which may come after ours.
func (t *told) complete(ctx context.Context, ids []string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()

	for _, id := range ids {
		if err := t.until(ctx, func() bool { return len(t.engine[id]) == len(wanted) }); err != nil {
			return fmt.Errorf("container %s: not all events of the engine come: %w", id, err)
		}
	}

	return nil
}

// live is one life; it ends when its last event has come.
func (c *Config) live(ctx context.Context, t *told, i int) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()

	command := []string{"sleep", "3600"}
	if i%3 == 0 {
		command = []string{"true"}
	}

	cfg := c.Container(fmt.Sprint("life-", i), command)
	made, err := c.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  c.Pod,
		Config:        cfg,
		SandboxConfig: c.PodOf,
	})
	if err != nil {
		return "", err
	}

	id = made.ContainerId
	if _, err := c.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return id, err
	}

	switch i % 3 {
	case 0:
		err = t.wait(ctx, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	case 1:
		_, err = c.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
	}

	if err != nil {
		return id, err
	}

	if _, err := c.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return id, err
	}

	return id, t.wait(ctx, id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
}

// wait waits for an event of the CRI.
func (t *told) wait(ctx context.Context, id string, kind runtimeapi.ContainerEventType) error {
	err := t.until(ctx, func() bool {
		return slices.ContainsFunc(t.cri[id], func(e event) bool { return e.kind == kind })
	})
	if err != nil {
		return fmt.Errorf("container %s: %s does not come: %w", id, kind, err)
	}
	return nil
}

// until waits for what has been told.
func (t *told) until(ctx context.Context, cond func() bool) error {
	for {
		t.mu.Lock()
		ok, changed := cond(), t.changed
		t.mu.Unlock()
		if ok {
			return nil
		}

		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// note takes down an event that has come.
func (t *told) note(do func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	do()
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *told) listenCRI(stream runtimeapi.RuntimeService_GetContainerEventsClient) error {
	for {
		e, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("events of the CRI: %w", err)
		}

		at := time.Now()
		t.note(func() {
			t.cri[e.ContainerId] = append(t.cri[e.ContainerId], event{kind: e.ContainerEventType, at: at})
		})
	}
}

func (t *told) listenEngine(ctx context.Context, r client.EventsResult) {
	for {
		select {
		case m := <-r.Messages:
			if kind, ok := actions[m.Action]; ok {
				t.note(func() {
					if t.engine[m.Actor.ID] == nil {
						t.engine[m.Actor.ID] = map[runtimeapi.ContainerEventType]time.Time{}
					}
					t.engine[m.Actor.ID][kind] = time.Unix(0, m.TimeNano)
				})
			}

		case <-r.Err:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (t *told) figures(ids []string) Figures {
	t.mu.Lock()
	defer t.mu.Unlock()

	f := Figures{Behind: map[runtimeapi.ContainerEventType][]time.Duration{}}
	for _, id := range ids {
		var kinds []runtimeapi.ContainerEventType
		for _, e := range t.cri[id] {
			kinds = append(kinds, e.kind)
			if at, ok := t.engine[id][e.kind]; ok {
				f.Behind[e.kind] = append(f.Behind[e.kind], e.at.Sub(at))
			}
		}

		if !slices.Equal(kinds, wanted) {
			f.Wrong = append(f.Wrong, fmt.Sprintf("%s: %v", id, kinds))
		}
	}

	return f
}
