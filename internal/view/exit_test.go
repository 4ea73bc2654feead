package view

import (
	"testing"
	"time"

	"cri-dockerd/internal/engine"
)

// fakeExits is a watch with exits set by the test.
type fakeExits struct {
	watched map[string]int
	codes   map[string]int
	ends    map[string]time.Time
}

func (f *fakeExits) Watch(id string, pid int) { f.watched[id] = pid }

func (f *fakeExits) Exit(id string) (int, time.Time, bool) {
	code, ok := f.codes[id]
	return code, f.ends[id], ok
}

func (f *fakeExits) Forget(id string) {
	delete(f.watched, id)
	delete(f.codes, id)
}

func (f *fakeExits) end(id string, code int, at time.Time) { f.codes[id], f.ends[id] = code, at }

// withExits returns a view of a running container with its memory and process watched.
func withExits(t *testing.T) (*View, *fakeOOM, *fakeExits) {
	t.Helper()
	v, oom := New(nil, discard), &fakeOOM{watched: map[string]int{}, hits: map[string]time.Time{}}
	x := &fakeExits{watched: map[string]int{}, codes: map[string]int{}, ends: map[string]time.Time{}}
	v.SetOOM(oom)
	v.SetExits(x)
	v.refreshed(running(7))
	if x.watched["c"] != 7 {
		t.Fatalf("watched: %v", x.watched)
	}

	return v, oom, x
}

// TestLostExitCode: the kernel's exit code replaces only a code lost by the engine.
func TestLostExitCode(t *testing.T) {
	for name, c := range map[string]struct {
		engine, kernel int // kernel -1: unknown
		end            int64
		code           int32
		reason         string
		finished       int64
	}{
		"lost":                      {255, 7, 200, 7, "Error", 200},
		"lost success":              {255, 0, 200, 0, "Completed", 200},
		"lost, and killed":          {255, 137, 200, 137, "Error", 200},
		"lost, unknown":             {255, -1, 200, 255, "Error", 900},
		"a true 255":                {255, 255, 200, 255, "Error", 900},
		"not lost":                  {3, 7, 200, 3, "Error", 900},
		"the end of an earlier run": {255, 7, 50, 255, "Error", 900},
	} {
		t.Run(name, func(t *testing.T) {
			for _, byEvent := range []bool{false, true} {
				v, _, x := withExits(t)
				if c.kernel >= 0 {
					x.end("c", c.kernel, at(c.end))
				}
				if byEvent {
					v.observe(engine.Event{ID: "c", Kind: engine.Died, ExitCode: c.engine, At: at(900)})
				}
				if !byEvent || c.code == killedCode { // the reason needs an inspection
					v.refreshed(ended(int32(c.engine), at(900)))
				}

				got, err := v.Container("c")
				if err != nil || got.ExitCode != c.code || got.Reason != c.reason ||
					!got.FinishedAt.Equal(at(c.finished)) {
					t.Errorf("reported by an event %v: %d, %s, %v, %v",
						byEvent, got.ExitCode, got.Reason, got.FinishedAt, err)
				}
			}
		})
	}
}

// TestOOMWhileTheEngineIsAway: the engine returns long after the OOM kill. It knows neither reason
// nor time, and possibly not the exit code.
func TestOOMWhileTheEngineIsAway(t *testing.T) {
	for _, code := range []int32{255, 137} {
		v, oom, x := withExits(t)
		oom.hits["c"] = at(200)
		x.end("c", 137, at(201))
		v.refreshed(ended(code, at(900)))
		got, err := v.Container("c")
		if err != nil || got.ExitCode != 137 || got.Reason != "OOMKilled" {
			t.Errorf("engine code %d: %d, %s, %v", code, got.ExitCode, got.Reason, err)
		}
	}
}

// TestExitsAreForgotten: watches end with the removal or a new start of the container.
func TestExitsAreForgotten(t *testing.T) {
	for _, kind := range []engine.EventKind{engine.Destroyed, engine.Started} {
		v, _, x := withExits(t)
		v.refreshed(ended(0, at(200)))
		v.observe(engine.Event{ID: "c", Kind: kind, At: at(300)})
		if len(x.watched) > 0 {
			t.Errorf("after event %v: %v", kind, x.watched)
		}
	}
}
