package task

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	eventtypes "github.com/containerd/containerd/api/events"
	coreevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/shim"
)

// Publisher publishes events to containerd, and the OOM kill of a container before its exit. Docker
// decides on the reason of an exit when the exit arrives, and runc's service publishes OOM kills
// independently of exits, so some arrive too late. It is safe for concurrent use.
type Publisher struct {
	shim.Publisher

	outputs outputs // released before the exit of their exec is published

	mu    sync.Mutex
	kills map[string]*kills // by container ID
}

// kills are the OOM kills of a container.
type kills struct {
	counter   oomCounter
	published atomic.Bool // containerd has an event for them
	ended     atomic.Bool // the exit of the container is or will be published
}

// NewPublisher returns a publisher in front of containerd's.
func NewPublisher(p shim.Publisher) *Publisher {
	return &Publisher{Publisher: p, kills: map[string]*kills{}}
}

// Publish publishes an event.
func (p *Publisher) Publish(ctx context.Context, topic string, event coreevents.Event) error {
	switch e := event.(type) {
	case *eventtypes.TaskOOM:
		k := p.find(e.ContainerID)
		if k != nil && k.published.Swap(true) && k.ended.Load() {
			return nil // published with the exit
		}

	case *eventtypes.TaskExit:
		if e.ID != e.ContainerID {
			p.outputs.release(e.ContainerID, e.ID)
			break
		}

		k := p.find(e.ContainerID)
		if k == nil {
			break
		}

		k.ended.Store(true)
		if k.counter.hasKills() && !k.published.Swap(true) {
			oom := &eventtypes.TaskOOM{ContainerID: e.ContainerID}
			if err := p.Publisher.Publish(ctx, runtime.TaskOOMEventTopic, oom); err != nil {
				logFailure(ctx, err)
			}
		}
	}

	return p.Publisher.Publish(ctx, topic, event)
}

// find returns the OOM kills of a container, nil if it is unknown.
func (p *Publisher) find(id string) *kills {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kills[id]
}

// watch watches the control group of a container's first process.
func (p *Publisher) watch(id string, pid int) error {
	counter, err := openCounter(pid)
	if err != nil {
		return fmt.Errorf("count the OOM kills of %s: %w", id, err)
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	p.kills[id] = &kills{counter: counter}

	return nil
}

// unwatch undoes watch.
func (p *Publisher) unwatch(id string) {
	p.mu.Lock()
	k := p.kills[id]
	delete(p.kills, id)
	p.mu.Unlock()

	if k != nil {
		k.counter.close()
	}
}
