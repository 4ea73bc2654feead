package task

import (
	"context"

	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/shim"
)

// queueLength is the number of unpublished events. A pause has five in its life.
const queueLength = 64

// events publishes the events of pauses in order.
type events struct {
	publisher shim.Publisher
	queue     chan any // events, and channels of flush
}

func newEvents(p shim.Publisher) *events {
	return &events{publisher: p, queue: make(chan any, queueLength)}
}

// run publishes events until ctx ends. The publisher retries by itself while containerd is down.
func (e *events) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case v := <-e.queue:
			if flushed, ok := v.(chan struct{}); ok {
				close(flushed)
				continue
			}

			if err := e.publisher.Publish(ctx, runtime.GetTopic(v), v); err != nil {
				logFailure(ctx, err)
			}
		}
	}
}

// send queues an event.
func (e *events) send(event any) { e.queue <- event }

// flush waits until all events of earlier calls of send are published.
func (e *events) flush(ctx context.Context) error {
	flushed := make(chan struct{})
	select {
	case e.queue <- flushed:
	case <-ctx.Done():
		return ctx.Err()
	}

	select {
	case <-flushed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
