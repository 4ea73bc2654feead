package engine

import (
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
		{events.ActionDie, nil, Event{}}, // to be looked at
		{events.ActionDestroy, nil, Event{Kind: Destroyed}},
		{events.ActionPause, nil, Event{}},
	} {
		const id = "c"
		test.want.ID, test.want.At = id, at
		m := events.Message{Action: test.action, Actor: events.Actor{ID: id, Attributes: test.attributes}, TimeNano: at.UnixNano()}
		if got := read(id, m); got != test.want {
			t.Errorf("%s %v: %+v, want %+v", test.action, test.attributes, got, test.want)
		}
	}
}
