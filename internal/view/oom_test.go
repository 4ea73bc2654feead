package view

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// fakeOOM is a watch with hits set by the test.
type fakeOOM struct {
	watched map[string]int
	hits    map[string]time.Time
	late    map[string]time.Time // hits that only Settle finds, if a SIGKILL ended the container
	settled []string
}

func (f *fakeOOM) Watch(id, _ string, pid int, _ time.Time) { f.watched[id] = pid }

func (f *fakeOOM) Settle(id, pod string, created, killed time.Time) {
	times := fmt.Sprintf("created %v, killed %v", !created.IsZero(), !killed.IsZero())
	f.settled = append(f.settled, fmt.Sprintf("%s of %s, %s", id, pod, times))
	if at, ok := f.late[id]; ok && killed.Equal(at) {
		f.hits[id] = at
	}
}

func (f *fakeOOM) Hit(id string) (time.Time, bool) {
	at, hit := f.hits[id]
	return at, hit
}

func (f *fakeOOM) Forget(id string) {
	delete(f.watched, id)
	delete(f.hits, id)
}

// exited is an engine with one exited container.
type exited struct {
	down
	object model.Object
}

func (e *exited) Objects(context.Context) ([]model.Object, error) {
	return []model.Object{e.object}, nil
}

func (e *exited) Inspect(context.Context, model.ContainerID) (model.Object, error) {
	return e.object, nil
}

func readEverything(t *testing.T, v *View) {
	t.Helper()
	if err := v.Resync(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func readAgain(t *testing.T, v *View) {
	t.Helper()
	if err := v.Refresh(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
}

// withOOM returns a view of a watched running container.
func withOOM(t *testing.T) (*View, *fakeOOM) {
	t.Helper()
	v, oom := New(nil, discard), &fakeOOM{watched: map[string]int{}, hits: map[string]time.Time{}}
	v.SetOOM(oom)
	v.refreshed(running(7))
	if oom.watched["c"] != 7 {
		t.Fatalf("watched: %v", oom.watched)
	}

	return v, oom
}

func at(s int64) time.Time { return time.Unix(s, 0) }

// refreshed does the same as Refresh with a given result.
func (v *View) refreshed(o model.Object) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.acceptLocked("c", o, v.store.beginInspection())
}

func running(pid int) model.Object {
	return model.Object{Container: &model.Container{
		ID:        "c",
		SandboxID: "pod",
		Pid:       pid,
		CreatedAt: at(1),
		StartedAt: at(100),
		State:     runtimeapi.ContainerState_CONTAINER_RUNNING,
	}}
}

// ended is an exit as described by an engine unaware of an OOM kill.
func ended(code int32, finished time.Time) model.Object {
	reason := model.ReasonError
	if code == 0 {
		reason = "Completed"
	}

	return model.Object{Container: &model.Container{
		ID:         "c",
		CreatedAt:  at(1),
		StartedAt:  at(100),
		FinishedAt: finished,
		ExitCode:   code,
		Reason:     reason,
		State:      runtimeapi.ContainerState_CONTAINER_EXITED,
	}}
}

func reason(t *testing.T, v *View) string {
	t.Helper()
	c, err := v.Container("c")
	if err != nil {
		t.Fatal(err)
	}
	return c.Reason
}

// TestOOMFromTheKernel: an exit by the OOM killer gets the reason missing at the engine, and no
// other exit does.
func TestOOMFromTheKernel(t *testing.T) {
	for name, c := range map[string]struct {
		code   int32
		hit    time.Time // zero: none
		killed bool      // through the engine
		want   string
	}{
		"killed by the OOM killer":            {code: 137, hit: at(199), want: "OOMKilled"},
		"reported a moment after the exit":    {code: 137, hit: at(201), want: "OOMKilled"},
		"killed by someone else":              {code: 137, want: "Error"},
		"killed long after a child":           {code: 137, hit: at(150), want: "Error"},
		"stopped through the engine":          {code: 137, hit: at(199), killed: true, want: "Error"},
		"child killed, container continues":   {code: 0, hit: at(199), want: "Completed"},
		"child killed, container fails later": {code: 1, hit: at(199), want: "Error"},
	} {
		t.Run(name, func(t *testing.T) {
			v, oom := withOOM(t)
			if !c.hit.IsZero() {
				oom.hits["c"] = c.hit
			}
			if c.killed {
				v.observe(engine.Event{ID: "c", Kind: engine.Killed, At: at(198)})
			}

			v.observe(engine.Event{ID: "c", Kind: engine.Died, At: at(200), ExitCode: int(c.code)})
			if x, _ := v.Container("c"); x.State == runtimeapi.ContainerState_CONTAINER_EXITED && x.Reason != c.want {
				t.Errorf("after the event: %s, want %s", x.Reason, c.want)
			}

			v.refreshed(ended(c.code, at(200)))
			if got := reason(t, v); got != c.want {
				t.Errorf("after an inspect: %s, want %s", got, c.want)
			}
		})
	}
}

// TestOOMIsSettled: the kernel is asked before the record of a container has its exit, so no status
// has another reason first, and a kill that was requested from the engine is none of the OOM
// killer's.
func TestOOMIsSettled(t *testing.T) {
	for name, c := range map[string]struct {
		code      int
		requested bool
		settled   string
		want      string
	}{
		"killed":              {137, false, "c of pod, created true, killed true", "OOMKilled"},
		"killed by request":   {137, true, "c of pod, created true, killed false", "Error"},
		"failed":              {1, false, "c of pod, created true, killed false", "Error"},
		"exit status is lost": {255, false, "c of pod, created true, killed true", "Error"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, way := range []string{"event", "inspection", "full read"} {
				v, oom := withOOM(t)
				v.src = &exited{object: ended(int32(c.code), at(200))}
				oom.late = map[string]time.Time{"c": at(200)}
				if c.requested {
					v.observe(engine.Event{ID: "c", Kind: engine.Killed, At: at(198)})
				}

				switch way {
				case "event":
					v.observe(engine.Event{ID: "c", Kind: engine.Died, At: at(200), ExitCode: c.code})
				case "inspection":
					readAgain(t, v)
				case "full read":
					readEverything(t, v)
				}

				readAgain(t, v) // known already

				x, _ := v.Container("c")
				if x.State == runtimeapi.ContainerState_CONTAINER_EXITED && x.Reason != c.want {
					t.Errorf("by %s: reason %s, want %s", way, x.Reason, c.want)
				}
				if !slices.Equal(oom.settled, []string{c.settled}) {
					t.Errorf("by %s: settled %q, want %q", way, oom.settled, c.settled)
				}
			}
		})
	}
}

// TestOOMOfAnOldExit: whether an exit before the start of the daemon was requested is unknown, so
// the kernel is not asked about it.
func TestOOMOfAnOldExit(t *testing.T) {
	oom := &fakeOOM{hits: map[string]time.Time{}, late: map[string]time.Time{"c": at(200)}}
	v := New(&exited{object: ended(137, at(200))}, discard)
	v.SetOOM(oom)
	readEverything(t, v)
	readAgain(t, v)

	if got := reason(t, v); got != model.ReasonError || len(oom.settled) > 0 {
		t.Errorf("reason %s, settled %q", got, oom.settled)
	}
}

// TestOOMReportedLate: the record of an exited container is corrected when the kernel's report
// arrives after the exit.
func TestOOMReportedLate(t *testing.T) {
	v, oom := withOOM(t)
	v.refreshed(ended(137, at(200)))
	if got := reason(t, v); got != model.ReasonError {
		t.Fatalf("without a report: %s", got)
	}

	oom.hits["c"] = at(200)
	v.ObserveOOM("c")
	if id, err := v.pending.next(t.Context()); id != "c" || err != nil {
		t.Errorf("read again: %s, %v", id, err)
	}

	v.refreshed(ended(137, at(200)))
	if got := reason(t, v); got != "OOMKilled" {
		t.Errorf("after the report: %s", got)
	}
}

// TestOOMOfAnotherRun: kills before a restart are irrelevant for the next exit, and a removed
// container is forgotten.
func TestOOMOfAnotherRun(t *testing.T) {
	v, oom := withOOM(t)
	oom.hits["c"] = at(199)
	// the late event of this run's start
	v.observe(engine.Event{ID: "c", Kind: engine.Started, At: at(100).Add(time.Millisecond)})
	if len(oom.hits) != 1 || oom.watched["c"] != 7 {
		t.Errorf("the late start event ended the watch: %+v", oom)
	}

	v.refreshed(ended(137, at(200)))
	v.observe(engine.Event{ID: "c", Kind: engine.Started, At: at(210)})
	if len(oom.hits) != 0 || len(oom.watched) != 0 {
		t.Errorf("after a restart: %+v", oom)
	}

	again := running(8)
	again.Container.StartedAt = at(210)
	v.refreshed(again)
	if oom.watched["c"] != 8 {
		t.Errorf("watched: %v", oom.watched)
	}

	v.observe(engine.Event{ID: "c", Kind: engine.Destroyed, At: at(220)})
	if len(oom.watched) != 0 {
		t.Errorf("after the removal: %v", oom.watched)
	}
}

// TestOOMAfterFullRead: running containers found by a full read are watched, and containers removed
// without an event are forgotten.
func TestOOMAfterFullRead(t *testing.T) {
	v, oom := withOOM(t)
	v.mu.Lock()
	defer v.mu.Unlock()

	for range 2 {
		v.publishLocked(v.store.replace(nil, v.store.beginInspection()))
	}

	if len(oom.watched) != 0 {
		t.Errorf("watched: %v", oom.watched)
	}
}
