package node

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// watchBuffer is how many changes a watch holds for a reader that is busy: more than come at once when a thousand pods have gone while the
// engine was away. An entry is a pointer.
const watchBuffer = 8192

// Pod is what is known of a pod at a moment.
type Pod struct {
	Sandbox    *spec.Sandbox     // as it is, or was last; in a Change nil when it is not known
	Containers []*spec.Container // newest first
	// At orders what is told of pods: what was known later has a later time, and no two are equal. A kubelet keeps the latest (KEP-3386).
	At time.Time
}

// Change is one transition of a container or a sandbox, and its pod after it.
type Change struct {
	Type runtimeapi.ContainerEventType
	ID   model.ContainerID // of the container or sandbox
	// Pod.At is the time of the transition as the engine has it, unless something newer has been told before.
	Pod
}

// Watch delivers the changes of a view since it was made. Its methods are safe for concurrent use.
type Watch struct {
	view    *View
	changes chan *Change
	err     error // why changes was closed; set before
}

// Watch begins to watch. Stop must be called.
func (v *View) Watch() *Watch {
	w := &Watch{view: v, changes: make(chan *Change, watchBuffer)}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.watches[w] = struct{}{}
	if v.ended {
		v.end(w, errStopping)
	}
	return w
}

var errStopping = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)

// Next waits for a change. It fails with ctx's error, with ResourceExhausted when changes were missed because they were not taken in time, and
// with Unavailable when the view ends; what came before is delivered first.
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
	w.view.end(w, context.Canceled)
}

// end ends a watch once. v.mu is held.
func (v *View) end(w *Watch, why error) {
	if _, ok := v.watches[w]; ok {
		delete(v.watches, w)
		w.err = why
		close(w.changes)
	}
}

// endAll ends all watches, and those to come.
func (v *View) endAll() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for w := range v.watches {
		v.end(w, errStopping)
	}
}

// tell delivers steps that the store has taken. It never waits. v.mu is held.
func (v *View) tell(steps []step) {
	for _, s := range steps {
		if s.kind == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			v.oom.Forget(string(s.id))
		}
	}
	if len(v.watches) == 0 {
		return
	}
	for _, s := range steps {
		c := &Change{Type: s.kind, ID: s.id, Pod: Pod{Sandbox: v.store.sandboxes[s.pod], Containers: v.store.of(s.pod), At: v.stamp(s.at)}}
		if c.Sandbox == nil {
			c.Sandbox = s.last
		}
		for w := range v.watches {
			select {
			case w.changes <- c:
			default:
				v.end(w, fmt.Errorf("more than %d events were not read; list and watch anew: %w", watchBuffer, errdefs.ErrResourceExhausted))
			}
		}
	}
}

// stamp is a time to tell something of, later than all before. v.mu is held.
func (v *View) stamp(t time.Time) time.Time {
	if now := time.Now().Round(0); t.IsZero() || t.After(now) {
		t = now
	}
	if !t.After(v.told) {
		t = v.told.Add(1)
	}
	v.told = t
	return t
}

// Pod is the pod with this sandbox ID or unique prefix of one. NotFound, or InvalidArgument for an ambiguous prefix.
func (v *View) Pod(sandboxID string) (Pod, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	sb, err := find(v.store.sandboxes, "sandbox", sandboxID)
	if err != nil {
		return Pod{}, err
	}
	return Pod{Sandbox: sb, Containers: v.store.of(sb.ID), At: v.stamp(time.Time{})}, nil
}
