package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/model"
)

// EventKind is a step in the lifecycle of a container.
type EventKind int

const (
	Changed     EventKind = iota // any other change
	Updated                      // the resources were updated
	Started                      // the main process was started
	OutOfMemory                  // the kernel's OOM killer has killed a process
	Killed                       // the engine has sent SIGKILL
	Died                         // the main process has exited
	Destroyed                    // the container was removed
)

// Event reports a change of one object.
type Event struct {
	// Missed reports lost events: the receiver must read all objects again. The other fields are
	// not set.
	Missed bool
	Image  bool // an image changed, not a container
	// ImageRef is the name or ID of the image, or "" if several may have changed.
	ImageRef string
	ID       model.ContainerID
	Kind     EventKind
	At       time.Time // by the engine's clock
	ExitCode int       // exit code for Died
}

// maxEvent bounds the size of one event in bytes. An event has the labels of its container,
// including those of the image.
const maxEvent = 256 << 20

var eventLimits = tolerant.Limits{
	Text:     4 << 10,
	Group:    16 << 10,
	Total:    1 << 20,
	Keep:     isEventAttribute,
	KeptText: 4 << 10,
}

// isEventAttribute reports whether an attribute is used by read. All others are labels of the
// container.
func isEventAttribute(key string) bool { return key == attrSignal || key == attrExitCode }

const (
	attrSignal   = "signal"
	attrExitCode = "exitCode"
)

// subscribeTimeout bounds the time until the header of the event stream, which the engine sends
// immediately.
const subscribeTimeout = 10 * time.Second

var errNoSubscription = fmt.Errorf("engine did not start the event stream within %s: %w", subscribeTimeout,
	errdefs.ErrUnavailable)

// Events subscribes to the engine's events. It returns after the subscription, or after
// subscribeTimeout. One goroutine calls changed for each event. changed must not block, because the
// engine silently drops events for slow readers. Events reports an unreadable event as Missed. When
// the stream ends, done receives the reason.
func (e *Engine) Events(ctx context.Context, changed func(Event)) (done <-chan error) {
	end, subscribed := make(chan error, 1), make(chan struct{})
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(subscribeTimeout, func() { cancel(errNoSubscription) })
	go func() {
		defer cancel(nil)

		err := readResponse(ctx, func(ctx context.Context) error {
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

// EventsBetween returns past events from the engine's buffer, which holds the last few hundred (GET
// /events with since and until). Times are by the engine's clock, and until must be in the past. An
// unreadable event is reported as Missed.
func (e *Engine) EventsBetween(ctx context.Context, since, until time.Time) ([]Event, error) {
	var out []Event
	err := readResponse(ctx, func(ctx context.Context) error {
		return e.requestEvents(ctx, client.EventsListOptions{Since: engineTime(since), Until: engineTime(until)})
	}, func(body io.Reader) error {
		return ignore(e.follow(body, func(ev Event) { out = append(out, ev) }), func(err error) bool {
			return errors.Is(err, io.EOF)
		})
	})

	return out, wrap(err, "read the engine's past events")
}

// engineTime formats a time for the engine's queries: seconds and nanoseconds.
func engineTime(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

// subscribedActions are the actions of containers with an effect on a record (see isRelevant), and
// all actions of images with an effect on the list of images. The engine filters by them, because
// it reports each exec of a container with three events.
var subscribedActions = strings.Fields(`
	start restart pause unpause update rename die oom destroy kill
	create import load tag untag pull prune delete commit`)

// requestEvents sends the request for events. Docker's client reads an empty stream, because
// readResponse diverts the body.
func (e *Engine) requestEvents(ctx context.Context, o client.EventsListOptions) error {
	o.Filters = make(client.Filters).
		Add("type", string(events.ContainerEventType), string(events.ImageEventType)).
		Add("event", subscribedActions...)
	return ignore(<-e.docker().Events(ctx, o).Err, func(err error) bool { return errors.Is(err, io.EOF) })
}

// follow reads events, one per line, and returns the error at the end of the stream (io.EOF at a
// regular end).
func (e *Engine) follow(body io.Reader, changed func(Event)) error {
	lines := bufio.NewReaderSize(body, 64<<10)

	for {
		line := &line{src: lines, allowed: maxEvent}
		var m events.Message
		_, bad := tolerant.Decode(line, &m, eventLimits)
		blank, err := line.finish()
		switch {
		case err != nil:
			return err
		case blank:
		case bad != nil:
			e.cfg.Log.Warn("failed to decode an event of the engine; reading all objects again", "err", bad)
			changed(Event{Missed: true})
		default:
			e.notify(m, changed)
		}
	}
}

// notify reports an event if it is relevant. An event without a valid container ID could affect any
// container, so it is reported as Missed.
func (e *Engine) notify(m events.Message, changed func(Event)) {
	switch m.Type {
	case events.ImageEventType:
		e := Event{Image: true, At: time.Unix(0, m.TimeNano)}
		switch m.Action {
		case events.ActionImport, events.ActionLoad, events.ActionPull, events.ActionTag,
			events.ActionUnTag, events.ActionDelete:
			e.ImageRef = m.Actor.ID
		}
		changed(e)

	case events.ContainerEventType:
		if !isRelevant(m) {
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

// line reads one line of a stream and stops at its end.
type line struct {
	src     *bufio.Reader
	allowed int  // remaining bytes up to the limit
	hasText bool // the line has more than white space
	ended   bool
	err     error
	part    []byte
}

// Read implements io.Reader. It removes the record separators of JSON sequences (RFC 7464).
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

// next reads the next part of the line.
func (l *line) next() {
	part, err := l.src.ReadSlice('\n')
	l.part = bytes.TrimPrefix(part, []byte{0x1e})
	l.hasText = l.hasText || len(bytes.TrimSpace(l.part)) > 0
	l.allowed -= len(part)

	switch {
	case err == nil:
		l.ended = true
	case !errors.Is(err, bufio.ErrBufferFull):
		l.err = err
	case l.allowed < 0:
		l.err = fmt.Errorf("event of more than %d bytes: %w", maxEvent, tolerant.ErrTooLarge)
	}
}

// finish discards the remainder of the line. blank reports whether the line was empty.
func (l *line) finish() (blank bool, err error) {
	for !l.ended && l.err == nil {
		l.next()
	}
	return !l.hasText, l.err
}

// read translates an event of a container. Its attributes include the exit code or the signal
// number (Docker API, GET /events).
func read(id model.ContainerID, m events.Message) Event {
	e := Event{ID: id, At: time.Unix(0, m.TimeNano)}
	switch m.Action {
	case events.ActionStart:
		e.Kind = Started
	case events.ActionUpdate:
		e.Kind = Updated
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

// isRelevant reports whether an event can change the record of a container. It ignores:
//   - exec events: every exec probe causes three of them
//   - signals other than SIGKILL: only their effect counts
//   - stop: it follows the die event
//   - create: this program creates the containers itself, and inspects each after its create. An
//     inspect for the event would wait for the start right after it, and then delay the inspect of
//     the call.
func isRelevant(m events.Message) bool {
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
