package engine

import (
	"context"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
)

// Event says that one object has changed.
type Event struct {
	Image bool      // an image; else a container
	ID    string    // of the container
	At    time.Time // the engine's own time
}

// Events subscribes to the engine's events before it returns. changed is called for each event, from one goroutine, and must not block:
// the engine drops events for slow readers without a word. done gives the reason for which the stream ended, once.
func (e *Engine) Events(ctx context.Context, changed func(Event)) (done <-chan error) {
	end := make(chan error, 1)
	stream := e.docker().Events(ctx, client.EventsListOptions{
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType), string(events.ImageEventType)),
	})
	go func() {
		for {
			select {
			case m := <-stream.Messages:
				if m.Type == events.ImageEventType {
					changed(Event{Image: true, At: time.Unix(0, m.TimeNano)})
				} else if m.Actor.ID != "" && matters(m.Action) {
					changed(Event{ID: m.Actor.ID, At: time.Unix(0, m.TimeNano)})
				}
			case err := <-stream.Err:
				end <- wrap(err, "follow the engine's events")
				return
			}
		}
	}()
	return end
}

// matters leaves out events that change nothing that is remembered: every exec probe makes three. A create is ours, and is read when its
// call goes on; an inspect for its event would wait for the start that follows at once, and then stand in the way of the call's own.
func matters(a events.Action) bool {
	switch a {
	case events.ActionStart, events.ActionRestart, events.ActionStop, events.ActionPause, events.ActionUnPause,
		events.ActionUpdate, events.ActionRename, events.ActionKill, events.ActionDie, events.ActionOOM, events.ActionDestroy:
		return true
	}
	return false
}
