// Package lifecycle takes containers and pods through their lifecycles for tests and benchmarks. It
// compares the engine's events with the CRI's (GetContainerEvents): was every transition published,
// in order, and with which latency.
package lifecycle

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

// Config selects the lifecycles to run.
type Config struct {
	Runtime runtimeapi.RuntimeServiceClient
	Docker  *client.Client
	Pod     string // a running sandbox
	PodOf   *runtimeapi.PodSandboxConfig
	// Container returns the configuration of a container with this name, from an image with a
	// shell.
	Container          func(name string, command []string) *runtimeapi.ContainerConfig
	Containers, AtOnce int
}

// Result contains the observed latencies and errors.
type Result struct {
	// Latency is the time from the engine's timestamp of an event to the arrival of the CRI's
	// event.
	Latency map[runtimeapi.ContainerEventType][]time.Duration
	// Unexpected lists the containers with any other sequence of events than expected.
	Unexpected []string
}

// actions maps the engine's events to the CRI's.
var actions = map[events.Action]runtimeapi.ContainerEventType{
	events.ActionCreate:  runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT,
	events.ActionStart:   runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	events.ActionDie:     runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT,
	events.ActionDestroy: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// expected is the sequence of events of every container.
var expected = []runtimeapi.ContainerEventType{
	runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
	runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// recorder records the events of both streams.
type recorder struct {
	mu      sync.Mutex
	changed chan struct{} // closed and renewed with each event
	cri     map[string][]event
	engine  map[string]map[runtimeapi.ContainerEventType]time.Time
}

// event is one CRI event with its arrival time.
type event struct {
	kind runtimeapi.ContainerEventType
	at   time.Time
}

// Run takes containers through three kinds of lifecycles in turn: exit by itself, stop, and removal
// while running.
func Run(ctx context.Context, c Config) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	t := &recorder{
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
		return Result{}, err
	}

	fromEngine := c.Docker.Events(ctx, client.EventsListOptions{
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType)),
	})
	listening.Go(func() { t.listenEngine(ctx, fromEngine) })
	broken := make(chan error, 1)
	listening.Go(func() { broken <- t.listenCRI(stream) })

	ids := make([]string, c.Containers)
	g, running := errgroup.WithContext(ctx)
	g.SetLimit(c.AtOnce)
	for i := range ids {
		g.Go(func() (err error) {
			ids[i], err = c.runOne(running, t, i)
			return err
		})
	}

	if err := g.Wait(); err != nil {
		select {
		case other := <-broken:
			err = errors.Join(err, other)
		default:
		}
		return Result{}, err
	}

	err = t.awaitEngine(ctx, ids)

	return t.result(ids), err
}

// awaitEngine waits for the engine's events, since they may arrive after the CRI's.
func (t *recorder) awaitEngine(ctx context.Context, ids []string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()

	for _, id := range ids {
		if err := t.until(ctx, func() bool { return len(t.engine[id]) == len(expected) }); err != nil {
			return fmt.Errorf("container %s: missing events of the engine: %w", id, err)
		}
	}

	return nil
}

// runOne takes one container through its lifecycle, until its last event has arrived.
func (c *Config) runOne(ctx context.Context, t *recorder, i int) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()

	command := []string{"sleep", "3600"}
	if i%3 == 0 {
		command = []string{"true"}
	}

	cfg := c.Container(fmt.Sprint("lifecycle-", i), command)
	created, err := c.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  c.Pod,
		Config:        cfg,
		SandboxConfig: c.PodOf,
	})
	if err != nil {
		return "", err
	}

	id = created.ContainerId
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

// wait waits for a CRI event.
func (t *recorder) wait(ctx context.Context, id string, kind runtimeapi.ContainerEventType) error {
	err := t.until(ctx, func() bool {
		return slices.ContainsFunc(t.cri[id], func(e event) bool { return e.kind == kind })
	})
	if err != nil {
		return fmt.Errorf("container %s: no event %s: %w", id, kind, err)
	}
	return nil
}

// until waits for a condition on the recorded events.
func (t *recorder) until(ctx context.Context, cond func() bool) error {
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

// record applies a new event and wakes all waiters.
func (t *recorder) record(do func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	do()
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *recorder) listenCRI(stream runtimeapi.RuntimeService_GetContainerEventsClient) error {
	for {
		e, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("CRI events: %w", err)
		}

		at := time.Now()
		t.record(func() {
			t.cri[e.ContainerId] = append(t.cri[e.ContainerId], event{kind: e.ContainerEventType, at: at})
		})
	}
}

func (t *recorder) listenEngine(ctx context.Context, r client.EventsResult) {
	for {
		select {
		case m := <-r.Messages:
			if kind, ok := actions[m.Action]; ok {
				t.record(func() {
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

func (t *recorder) result(ids []string) Result {
	t.mu.Lock()
	defer t.mu.Unlock()

	f := Result{Latency: map[runtimeapi.ContainerEventType][]time.Duration{}}
	for _, id := range ids {
		var kinds []runtimeapi.ContainerEventType
		for _, e := range t.cri[id] {
			kinds = append(kinds, e.kind)
			if at, ok := t.engine[id][e.kind]; ok {
				f.Latency[e.kind] = append(f.Latency[e.kind], e.at.Sub(at))
			}
		}

		if !slices.Equal(kinds, expected) {
			f.Unexpected = append(f.Unexpected, fmt.Sprintf("%s: %v", id, kinds))
		}
	}

	return f
}
