package engine

import (
	"context"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// EventKind is what has happened to a container, as far as its life goes.
type EventKind int

const (
	Changed     EventKind = iota // something else
	Started                      // its process runs
	OutOfMemory                  // the kernel has killed one of its processes for want of memory
	Killed                       // the engine has sent it SIGKILL
	Died                         // its process has ended
	Destroyed                    // it is gone
)

// Event says that one object has changed.
type Event struct {
	Image bool // an image; else a container
	ID    model.ContainerID
	Kind  EventKind
	At    time.Time // the engine's own time
	// ExitCode is that of one that has Died.
	ExitCode int
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
				} else if id, err := model.ParseContainerID(m.Actor.ID); err == nil && matters(m.Action) {
					changed(read(id, m))
				}
			case err := <-stream.Err:
				end <- wrap(err, "follow the engine's events")
				return
			}
		}
	}()
	return end
}

// read is a container's event. Its attributes have the exit code of an end and the number of a signal (Docker API, GET /events).
func read(id model.ContainerID, m events.Message) Event {
	e := Event{ID: id, At: time.Unix(0, m.TimeNano)}
	switch m.Action {
	case events.ActionStart:
		e.Kind = Started
	case events.ActionOOM:
		e.Kind = OutOfMemory
	case events.ActionKill:
		if m.Actor.Attributes["signal"] == strconv.Itoa(int(unix.SIGKILL)) {
			e.Kind = Killed
		}
	case events.ActionDie:
		if code, err := strconv.Atoi(m.Actor.Attributes["exitCode"]); err == nil {
			e.Kind, e.ExitCode = Died, code
		}
	case events.ActionDestroy:
		e.Kind = Destroyed
	}
	return e
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
