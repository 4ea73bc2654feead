package view

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// watchBuffer is the number of changes that a watch holds for a busy reader. It exceeds the changes
// that arrive together after a thousand pods were removed during an outage of the engine. An
// element is a pointer.
const watchBuffer = 8192

var errStopping = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)

// Pod is the state of a pod at one moment.
type Pod struct {
	Sandbox    *model.Sandbox     // the last known record; in a Change nil if there was none
	Containers []*model.Container // newest first
	// At orders the states of pods. It grows with each published state, and no two are equal. A
	// kubelet keeps the latest (KEP-3386).
	At time.Time
}

// Change is a transition of a container or a sandbox, and the pod after it.
type Change struct {
	Type runtimeapi.ContainerEventType
	ID   model.ContainerID // of the container or sandbox
	// Pod.At is the engine's time of the transition, or later if a newer state was published
	// before.
	Pod
}

// Watch delivers the changes of a view since its creation. Its methods are safe for concurrent use.
type Watch struct {
	view    *View
	changes chan *Change
	err     error // why changes was closed; set before
}

// Watch starts a watch. The caller must call Stop.
func (v *View) Watch() *Watch {
	w := &Watch{view: v, changes: make(chan *Change, watchBuffer)}
	v.mu.Lock()
	defer v.mu.Unlock()

	v.watches[w] = struct{}{}
	if v.ended {
		v.endLocked(w, errStopping)
	}

	return w
}

// Next waits for a change. It fails with ctx's error, with ResourceExhausted if the reader was too
// slow and changes were dropped, and with Unavailable when the view ends. It delivers all earlier
// changes first.
func (w *Watch) Next(ctx context.Context) (*Change, error) {
	select {
	case c, ok := <-w.changes:
		if !ok {
			return nil, w.err
		}
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Stop ends the watch.
func (w *Watch) Stop() {
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	w.view.endLocked(w, context.Canceled)
}

// endLocked ends a watch once.
func (v *View) endLocked(w *Watch, cause error) {
	if _, ok := v.watches[w]; ok {
		delete(v.watches, w)
		w.err = cause
		close(w.changes)
	}
}

// endAll ends all current and future watches.
func (v *View) endAll() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for w := range v.watches {
		v.endLocked(w, errStopping)
	}
}

// publishLocked sends transitions to all watches. It never blocks.
func (v *View) publishLocked(transitions []transition) {
	visible := v.store.dropConcealed(transitions)
	for _, t := range transitions {
		if t.kind == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			v.oom.Forget(string(t.id))
			v.exits.Forget(string(t.id))
			v.store.forgetConcealed(t.id)
		}
	}

	if len(v.watches) == 0 {
		return
	}

	for _, t := range visible {
		v.sendLocked(v.changeLocked(t))
	}
}

// changeLocked adds the pod to a transition.
func (v *View) changeLocked(t transition) *Change {
	sandbox := v.store.object(t.pod).Sandbox
	if sandbox == nil {
		sandbox = t.last
	}

	return &Change{
		Type: t.kind,
		ID:   t.id,
		Pod: Pod{
			Sandbox:    sandbox,
			Containers: v.store.visibleContainers(v.store.containersOf(t.pod)),
			At:         v.stampLocked(t.at),
		},
	}
}

// sendLocked sends a change to all watches. It ends watches with a full buffer.
func (v *View) sendLocked(c *Change) {
	for w := range v.watches {
		select {
		case w.changes <- c:
		default:
			v.endLocked(w, fmt.Errorf("more than %d events were not read; list and watch again: %w",
				watchBuffer, errdefs.ErrResourceExhausted))
		}
	}
}

// stampLocked returns t, or now if t is unknown or in the future, moved after all earlier results.
func (v *View) stampLocked(t time.Time) time.Time {
	if now := time.Now().Round(0); t.IsZero() || t.After(now) {
		t = now
	}
	if !t.After(v.lastStamp) {
		t = v.lastStamp.Add(1)
	}

	v.lastStamp = t

	return t
}

// Pod returns the pod with this sandbox ID or unique prefix of an ID. It returns NotFound, or
// InvalidArgument for an ambiguous prefix.
func (v *View) Pod(sandboxID string) (Pod, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := v.store.findSandbox(sandboxID)
	if err != nil {
		return Pod{}, err
	}
	if v.store.isConcealed(s.ID) {
		return Pod{}, fmt.Errorf("sandbox %s: %w", sandboxID, errdefs.ErrNotFound)
	}

	return Pod{
		Sandbox:    s,
		Containers: v.store.visibleContainers(v.store.containersOf(s.ID)),
		At:         v.stampLocked(time.Time{}),
	}, nil
}
