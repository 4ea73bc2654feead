package view

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const (
	readDeadline = 2 * time.Minute // for one full read
	// workers read the containers named by events. An inspection longer than slowInspect continues
	// in the background. At most slowInspects wait there: containers on which the engine hangs must
	// not delay the others.
	workers      = 8
	slowInspect  = 500 * time.Millisecond
	slowInspects = 64
	// A failed read is retried after retryMin, then after twice the delay, up to retryMax.
	retryMin = time.Second
	retryMax = time.Minute
)

// readAll reads all objects. The reason is for the metrics. Results of later inspections win.
func (v *View) readAll(ctx context.Context, reason string) error {
	v.metrics.countResync(reason)
	v.reading.Store(time.Now().UnixNano())
	defer v.reading.Store(0)

	ctx, cancel := context.WithTimeout(ctx, readDeadline)
	defer cancel()

	// Images come first: reading a container requires the labels of its image.
	if err := v.listImages(ctx, imagesTimeout); err != nil {
		return err
	}

	ticket := v.beginInspection()
	objects, err := v.src.Objects(ctx)
	if err != nil {
		return err
	}
	for _, o := range objects {
		v.settleInspected(o)
	}

	v.mu.Lock()
	defer v.mu.Unlock()

	for i, o := range objects {
		if o.Unread != "" {
			v.retryLocked(o.Unread)
		}
		objects[i] = v.addExitLocked(o)
	}

	v.publishLocked(v.store.replace(objects, ticket))
	for _, o := range objects {
		v.watchKernelLocked(o)
		if c := o.Container; c != nil && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			v.updated.add(c.ID, 0)
		}
	}

	return nil
}

// Resync reads everything again, without an event.
func (v *View) Resync(ctx context.Context) error { return v.readAll(ctx, resyncReload) }

// readPending reads the containers named by events, one after the other. Slow inspections continue
// in g.
func (v *View) readPending(ctx context.Context, g *errgroup.Group) error {
	for {
		id, err := v.pending.next(ctx)
		if err != nil {
			return err
		}

		read := make(chan error, 1)
		go func() { read <- v.readOne(ctx, id) }()

		select {
		case err := <-read:
			if err := v.finishRead(ctx, id, err); err != nil {
				return err
			}
			continue
		case <-time.After(slowInspect):
		}

		select {
		case v.slow <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}

		g.Go(func() error {
			defer func() { <-v.slow }()
			return v.finishRead(ctx, id, <-read)
		})
	}
}

// finishRead schedules a retry if the read of one container failed. It returns an error if the
// engine is unavailable.
func (v *View) finishRead(ctx context.Context, id model.ContainerID, err error) error {
	if err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)) {
		return err
	}

	v.mu.Lock()
	defer v.mu.Unlock()

	if err == nil {
		delete(v.retries, id)
		return nil
	}

	// The engine is up but cannot describe this container: it is being removed, or hangs.
	v.retryLocked(id)
	v.log.Debug("cannot inspect container", "container", id, "retry", v.retries[id], "err", err)

	return nil
}

// retryLocked schedules another read of a container. The delay doubles each time.
func (v *View) retryLocked(id model.ContainerID) {
	v.retries[id] = nextRetry(v.retries[id])
	v.pending.add(id, v.retries[id])
}

// nextRetry returns the delay after another failure, given the one before.
func nextRetry(last time.Duration) time.Duration { return min(max(2*last, retryMin), retryMax) }

// beginInspection returns the ticket of an inspection starting now.
func (v *View) beginInspection() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store.beginInspection()
}

// Refresh reads objects again, so that the view reflects the caller's changes. It drops objects
// removed meanwhile. A failed read is retried later: the caller may have changed the object, or an
// event may have named it.
func (v *View) Refresh(ctx context.Context, ids ...model.ContainerID) error {
	var errs []error
	for _, id := range ids {
		if err := v.readOne(ctx, id); err != nil {
			v.mu.Lock()
			v.retryLocked(id)
			v.mu.Unlock()
			errs = append(errs, err)
		}
	}

	return errors.Join(errs...)
}

// readOne reads one object. It takes the object from the queue, so the caller must retry on error.
func (v *View) readOne(ctx context.Context, id model.ContainerID) error {
	v.pending.remove(id) // this inspection covers all earlier requests
	seen := v.metrics.beginRead(id)
	ticket := v.beginInspection()
	o, err := v.src.Inspect(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	v.settleInspected(o)

	v.mu.Lock()
	defer v.mu.Unlock()

	v.acceptLocked(id, o, ticket)
	seen()

	return nil
}

// acceptLocked stores the result of an inspection.
func (v *View) acceptLocked(id model.ContainerID, o model.Object, ticket uint64) {
	old := v.store.object(id).Container
	o = v.addExitLocked(o)
	v.publishLocked(v.store.put(id, o, ticket))
	v.watchKernelLocked(o)

	if c := o.Container; c != nil && old != nil && !proto.Equal(c.Resources, old.Resources) {
		v.updated.add(id, 0)
	}
}

// NextUpdated waits for a container whose limits somebody may have replaced: after an update
// through the engine, and after each full read, because events may be missing. It fails with ctx's
// error.
func (v *View) NextUpdated(ctx context.Context) (model.ContainerID, error) {
	return v.updated.next(ctx)
}

// AddUpdated makes NextUpdated return a container after a delay.
func (v *View) AddUpdated(id model.ContainerID, delay time.Duration) { v.updated.add(id, delay) }
