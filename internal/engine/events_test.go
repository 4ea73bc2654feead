package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"
)

func TestRead(t *testing.T) {
	at := time.Unix(5, 6)

	for _, test := range []struct {
		action     events.Action
		attributes map[string]string
		want       Event
	}{
		{events.ActionStart, nil, Event{Kind: Started}},
		{events.ActionOOM, nil, Event{Kind: OutOfMemory}},
		{events.ActionKill, map[string]string{"signal": "9"}, Event{Kind: Killed}},
		{events.ActionKill, map[string]string{"signal": "15"}, Event{}},
		{events.ActionDie, map[string]string{"exitCode": "3"}, Event{Kind: Died, ExitCode: 3}},
		{events.ActionDie, nil, Event{}}, // an inspect is needed
		{events.ActionDestroy, nil, Event{Kind: Destroyed}},
		{events.ActionPause, nil, Event{}},
	} {
		t.Run(fmt.Sprint(test.action, test.attributes), func(t *testing.T) {
			const id = "c"
			test.want.ID, test.want.At = id, at
			m := events.Message{
				Action:   test.action,
				Actor:    events.Actor{ID: id, Attributes: test.attributes},
				TimeNano: at.UnixNano(),
			}
			if got := read(id, m); got != test.want {
				t.Errorf("read = %+v, want %+v", got, test.want)
			}
		})
	}
}

// TestImageEvents: events of one image have a reference to read, the others have none.
func TestImageEvents(t *testing.T) {
	for action, want := range map[events.Action]string{
		events.ActionImport: "app:1",
		events.ActionPull:   "app:1",
		events.ActionTag:    "app:1",
		events.ActionLoad:   "app:1",
		events.ActionUnTag:  "app:1",
		events.ActionDelete: "app:1",
		events.ActionPrune:  "",
	} {
		var got Event
		(&Engine{}).notify(events.Message{
			Type:   events.ImageEventType,
			Action: action,
			Actor:  events.Actor{ID: "app:1"},
		}, func(e Event) { got = e })
		if !got.Image || got.ImageRef != want {
			t.Errorf("%s: %+v, want reference %q", action, got, want)
		}
	}
}

// TestIsRelevant checks that events without any effect on an inspect are ignored.
func TestIsRelevant(t *testing.T) {
	signal := func(s string) map[string]string { return map[string]string{"signal": s} }

	for _, test := range []struct {
		action     events.Action
		attributes map[string]string
		want       bool
	}{
		{events.ActionStart, nil, true},
		{events.ActionDie, nil, true},
		{events.ActionPause, nil, true},
		{events.ActionKill, signal("9"), true}, // the reason for the exit
		{events.ActionKill, signal("15"), false},
		{events.ActionKill, nil, false},
		{events.ActionStop, nil, false},
		{events.ActionCreate, nil, false},
		{events.ActionExecStart, nil, false},
	} {
		t.Run(fmt.Sprint(test.action, test.attributes), func(t *testing.T) {
			m := events.Message{Action: test.action, Actor: events.Actor{Attributes: test.attributes}}
			if got := isRelevant(m); got != test.want {
				t.Errorf("isRelevant = %v, want %v", got, test.want)
			}
		})
	}
}

// TestSubscribedActions checks that the engine's filter passes on all relevant events, and no
// events of execs.
func TestSubscribedActions(t *testing.T) {
	kill := map[string]string{"signal": "9"}
	for _, action := range []events.Action{
		events.ActionCreate, events.ActionStart, events.ActionRestart, events.ActionStop, events.ActionPause,
		events.ActionUnPause, events.ActionUpdate, events.ActionRename, events.ActionKill, events.ActionDie,
		events.ActionOOM, events.ActionDestroy, events.ActionExecCreate, events.ActionExecStart, events.ActionExecDie,
		events.ActionExecDetach, events.ActionTop, events.ActionResize, events.ActionAttach,
	} {
		relevant := isRelevant(events.Message{Action: action, Actor: events.Actor{Attributes: kill}})
		subscribed := slices.Contains(subscribedActions, string(action))
		if relevant && !subscribed {
			t.Errorf("%s is relevant, but filtered out", action)
		}
		if subscribed && strings.HasPrefix(string(action), "exec_") {
			t.Errorf("%s is subscribed", action)
		}
	}
}
