package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/engine/tolerant"
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
	Missed bool // events were lost: everything is to be read anew; the other fields are not set
	Image  bool // an image; else a container
	ID     model.ContainerID
	Kind   EventKind
	At     time.Time // the engine's own time
	// ExitCode is that of one that has Died.
	ExitCode int
}

// maxEvent is how many bytes of one event are read. An event carries the labels of its container,
// the image's among them.
const maxEvent = 256 << 20

var eventLimits = tolerant.Limits{
	Text:     4 << 10,
	Group:    16 << 10,
	Total:    1 << 20,
	Keep:     isEventAttribute,
	KeptText: 4 << 10,
}

// isEventAttribute names the attributes that read needs; the others are the container's labels.
func isEventAttribute(key string) bool { return key == attrSignal || key == attrExitCode }

const (
	attrSignal   = "signal"
	attrExitCode = "exitCode"
)

// subscribeTimeout is for the beginning of an event stream, which the engine answers at once.
const subscribeTimeout = 10 * time.Second

var errNoSubscription = fmt.Errorf("the engine has not begun its event stream within %s: %w", subscribeTimeout,
	errdefs.ErrUnavailable)

// Events subscribes to the engine's events before it returns, within subscribeTimeout. changed is
// called for each event, from one goroutine, and must not block: the engine drops events for slow
// readers without a word. An event that cannot be read is skipped and reported as Missed. done
// gives the reason for which the stream ended, once.
func (e *Engine) Events(ctx context.Context, changed func(Event)) (done <-chan error) {
	end, subscribed := make(chan error, 1), make(chan struct{})
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(subscribeTimeout, func() { cancel(errNoSubscription) })
	go func() {
		defer cancel(nil)

		err := ask(ctx, func(ctx context.Context) error {
			return e.requestEvents(ctx, client.EventsListOptions{})
		}, func(body io.Reader) error {
			late.Stop()
			close(subscribed)
			return e.follow(body, changed)
		})

		late.Stop()
		end <- wrap(causeOr(ctx, err), "follow the engine's events")
		select {
		case <-subscribed:
		default:
			close(subscribed)
		}
	}()

	<-subscribed

	return end
}

// EventsBetween returns the events of a span of the engine's time that it remembers (GET /events
// with since and until); it keeps the last few hundred. Missed stands for one that cannot be read.
// until must have passed.
func (e *Engine) EventsBetween(ctx context.Context, since, until time.Time) ([]Event, error) {
	var out []Event
	err := ask(ctx, func(ctx context.Context) error {
		return e.requestEvents(ctx, client.EventsListOptions{Since: engineTime(since), Until: engineTime(until)})
	}, func(body io.Reader) error {
		return ignore(e.follow(body, func(ev Event) { out = append(out, ev) }), func(err error) bool {
			return errors.Is(err, io.EOF)
		})
	})

	return out, wrap(err, "read the engine's last events")
}

// engineTime is a time as the engine's queries have it: seconds and nanoseconds.
func engineTime(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

// requestEvents asks for events. Docker's client reads an empty stream to its end, since the body
// is ours.
func (e *Engine) requestEvents(ctx context.Context, o client.EventsListOptions) error {
	o.Filters = make(client.Filters).Add("type", string(events.ContainerEventType), string(events.ImageEventType))
	return ignore(<-e.docker().Events(ctx, o).Err, func(err error) bool { return errors.Is(err, io.EOF) })
}

// follow reads events, one a line, until the stream ends with an error. io.EOF is one.
func (e *Engine) follow(body io.Reader, changed func(Event)) error {
	lines := bufio.NewReaderSize(body, 64<<10)

	for {
		line := &line{src: lines, rest: maxEvent}
		var m events.Message
		_, bad := tolerant.Decode(line, &m, eventLimits)
		blank, err := line.finish()
		switch {
		case err != nil:
			return err
		case blank:
		case bad != nil:
			e.cfg.Log.Warn("an event of the engine cannot be read; everything is read anew", "err", bad)
			changed(Event{Missed: true})
		default:
			e.notify(m, changed)
		}
	}
}

// notify passes on an event that matters. One without a valid container ID may stand for any.
func (e *Engine) notify(m events.Message, changed func(Event)) {
	switch m.Type {
	case events.ImageEventType:
		changed(Event{Image: true, At: time.Unix(0, m.TimeNano)})
	case events.ContainerEventType:
		if !matters(m) {
			return
		}
		id, err := model.ParseContainerID(m.Actor.ID)
		if err != nil {
			changed(Event{Missed: true})
			return
		}
		changed(read(id, m))
	}
}

// line reads one line of a stream, and never beyond it.
type line struct {
	src   *bufio.Reader
	rest  int  // bytes that it may still have
	some  bool // it has more than white space
	ended bool
	err   error
	part  []byte
}

// Read implements io.Reader. The marks of JSON sequences (RFC 7464) are left out.
func (l *line) Read(p []byte) (int, error) {
	for len(l.part) == 0 {
		if l.err != nil {
			return 0, l.err
		}
		if l.ended {
			return 0, io.EOF
		}
		l.next()
	}

	n := copy(p, l.part)
	l.part = l.part[n:]

	return n, nil
}

// next takes the next part of the line.
func (l *line) next() {
	part, err := l.src.ReadSlice('\n')
	l.part = bytes.TrimPrefix(part, []byte{0x1e})
	l.some = l.some || len(bytes.TrimSpace(l.part)) > 0
	l.rest -= len(part)
	switch {
	case err == nil:
		l.ended = true
	case !errors.Is(err, bufio.ErrBufferFull):
		l.err = err
	case l.rest < 0:
		l.err = fmt.Errorf("an event of more than %d bytes: %w", maxEvent, tolerant.ErrTooLarge)
	}
}

// finish reads the rest of the line. blank says that there was nothing on it.
func (l *line) finish() (blank bool, err error) {
	for !l.ended && l.err == nil {
		l.next()
	}
	return !l.some, l.err
}

// read is a container's event. Its attributes have the exit code of an end and the number of a
// signal (Docker API, GET /events).
func read(id model.ContainerID, m events.Message) Event {
	e := Event{ID: id, At: time.Unix(0, m.TimeNano)}
	switch m.Action {
	case events.ActionStart:
		e.Kind = Started
	case events.ActionOOM:
		e.Kind = OutOfMemory
	case events.ActionKill:
		if isSIGKILL(m) {
			e.Kind = Killed
		}

	case events.ActionDie:
		if code, err := strconv.Atoi(m.Actor.Attributes[attrExitCode]); err == nil {
			e.Kind, e.ExitCode = Died, code
		}

	case events.ActionDestroy:
		e.Kind = Destroyed
	}

	return e
}

// matters leaves out events that change nothing that is remembered: every exec probe makes three, a
// signal is seen by what it does, and a stop follows the end that it reports. A create is ours, and
// is read when its call goes on; an inspect for its event would wait for the start that follows at
// once, and then stand in the way of the call's own.
func matters(m events.Message) bool {
	switch m.Action {
	case events.ActionStart, events.ActionRestart, events.ActionPause, events.ActionUnPause,
		events.ActionUpdate, events.ActionRename, events.ActionDie, events.ActionOOM, events.ActionDestroy:
		return true
	case events.ActionKill:
		return isSIGKILL(m)
	}

	return false
}

func isSIGKILL(m events.Message) bool {
	return m.Actor.Attributes[attrSignal] == strconv.Itoa(int(unix.SIGKILL))
}
