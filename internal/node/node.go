// Package node is what runs on this node, in memory: sandboxes, containers and images, filled from Docker and kept in step by its events
// (Docker is the source of truth, memory is a view of it). Every List and Status RPC is answered from here.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Source is the engine as the view needs it.
type Source interface {
	// Host connects and reads what the engine is.
	Host(ctx context.Context) (spec.Host, error)
	// Ping fails if the engine does not answer before ctx ends.
	Ping(ctx context.Context) error
	// Objects reads every container of ours. One that cannot be described in time is Unread.
	Objects(ctx context.Context) ([]spec.Object, error)
	// Inspect reads one container; NotFound if it is gone, an empty object if it is not ours.
	Inspect(ctx context.Context, id model.ContainerID) (spec.Object, error)
	// Images reads all images. One that is not described in time is Stale.
	Images(ctx context.Context) ([]*spec.Image, error)
	// Image reads one image by its name or ID, NotFound if there is none.
	Image(ctx context.Context, ref string) (*spec.Image, error)
	// EventsBetween returns the events of a span of time that the engine remembers, as Events would have given them.
	EventsBetween(ctx context.Context, since, until time.Time) ([]engine.Event, error)
	// Events subscribes before it returns; changed must not block; done tells the stream's end once.
	Events(ctx context.Context, changed func(engine.Event)) (done <-chan error)
}

// EngineState is the state of the connection to Docker.
type EngineState struct {
	Looked bool // the engine has been looked at since the start, whatever came of it
	// Connected says that the engine has answered, so that Host is true of it. Ready implies it.
	Connected bool
	Ready     bool   // events flow and the view is complete
	Reason    string // why not, in words; "" when Ready
	Host      spec.Host
}

const (
	backoffMin   = 100 * time.Millisecond
	backoffMax   = 2 * time.Second
	resyncPeriod = 5 * time.Minute // against events that the engine dropped
	readDeadline = 2 * time.Minute // for one look at everything
	// settle is how long events gather before they are looked into. A call of our own that caused one reads the object itself meanwhile.
	settle = 5 * time.Millisecond
	// workers read what events have named. One that waits longer than slowInspect goes on in the background, where at most
	// slowInspects wait: containers on which the engine hangs must not hold up the others.
	workers      = 8
	slowInspect  = 500 * time.Millisecond
	slowInspects = 64
	// What the engine could not describe is read again after retryMin, then after twice that, and so on.
	retryMin = time.Second
	retryMax = time.Minute
	// HeartbeatInterval is between two pings, so that an engine that hangs is noticed within 20 s.
	HeartbeatInterval = 5 * time.Second
	heartbeatTimeout  = 10 * time.Second
	// hostTimeout is for the connection.
	hostTimeout = 30 * time.Second
	// imagesTimeout is for the list of images when everything is read: the view is ready without it. Later lists have
	// imagesRetryTimeout.
	imagesTimeout      = 5 * time.Second
	imagesRetryTimeout = 15 * time.Second
)

// allImages is the one element of View.dirtyImages.
const allImages = model.ContainerID("")

// View is the node's state. It is safe for concurrent use.
type View struct {
	src    Source
	log    *slog.Logger
	synced chan struct{} // one element after each first look of a connection

	dirty       *dirtySet     // containers
	dirtyImages *dirtySet     // its one element stands for all
	missed      chan struct{} // an element after events that were lost
	arrived     arrivals
	slow        chan struct{} // an element for each inspect that waits in the background
	oom         OOM
	metrics     *viewMetrics
	reading     atomic.Int64 // since when everything is being read, in nanoseconds of Unix time; 0: it is not

	mu      sync.RWMutex // guards all below
	state   EngineState
	changed chan struct{} // closed with the next change of state
	store   store
	images  imageStore
	retries map[model.ContainerID]time.Duration // the last pause before what could not be read is read again
	// imagesPause is the same for the list of images.
	imagesPause time.Duration

	watches map[*Watch]struct{}
	told    time.Time // the latest that was given to what was told of a pod
	ended   bool
}

// New returns an empty view, which is not ready until Run has connected.
func New(src Source, log *slog.Logger) *View {
	return &View{
		src:         src,
		log:         log,
		oom:         noOOM{},
		synced:      make(chan struct{}, 1),
		dirty:       newDirtySet(),
		dirtyImages: newDirtySet(),
		missed:      make(chan struct{}, 1),
		slow:        make(chan struct{}, slowInspects),
		metrics:     newViewMetrics(),
		state:       EngineState{Reason: "not yet connected to Docker"},
		changed:     make(chan struct{}),
		store:       newStore(),
		images:      newImageStore(),
		retries:     map[model.ContainerID]time.Duration{},
		watches:     map[*Watch]struct{}{},
	}
}

// Synced has an element whenever the view has been read anew after a connection was made.
func (v *View) Synced() <-chan struct{} { return v.synced }

// Engine is the state of the connection.
func (v *View) Engine() EngineState {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.state
}

// Changed is closed when Engine changes next.
func (v *View) Changed() <-chan struct{} {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.changed
}

// setConnected publishes what the engine is, before its containers are read. A view that is ready stays so.
func (v *View) setConnected(host spec.Host) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.state
	s.Connected, s.Host = true, host
	v.setState(s)
}

// setState needs the lock.
func (v *View) setState(s EngineState) {
	if s.Ready != v.state.Ready || s.Connected != v.state.Connected || s.Reason != v.state.Reason {
		close(v.changed)
		v.changed = make(chan struct{})
	}
	v.state = s
}

// Run keeps the view in step with the engine until ctx ends: it connects, reads everything, follows the events, and starts again when the
// engine goes away. Watches end with it.
func (v *View) Run(ctx context.Context) error {
	defer v.endAll()
	for wait := backoffMin; ; wait = min(max(2*wait, backoffMin), backoffMax) {
		err := v.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, errEventsMissed) { // the engine is there; the stream begins anew, and calls are answered meanwhile
			wait = 0
			continue
		}
		if v.Engine().Ready {
			wait = backoffMin
			v.log.Warn("lost Docker", "err", err)
		} else if wait == backoffMin {
			v.log.Warn("Docker is not ready", "err", err)
		}
		v.setDown(err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

func (v *View) setDown(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	reason := fmt.Sprintf("Docker does not answer: %v; start it (systemctl start docker) or correct --docker-endpoint", err)
	if errdefs.IsFailedPrecondition(err) {
		reason = err.Error()
	}
	v.setState(EngineState{Looked: true, Reason: reason, Host: v.state.Host})
}

var errStreamEnded = errors.New("the engine ended its event stream")

// follow holds one connection: it returns with the reason for its end.
func (v *View) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	host, err := v.host(ctx)
	if err != nil {
		return err
	}
	v.setConnected(host)
	done := v.src.Events(ctx, v.heed)
	if err := v.readAll(ctx, resyncConnect); err != nil {
		return err
	}
	v.log.Info("connected to Docker", "version", host.EngineVersion, "api", host.APIVersion)
	v.mu.Lock()
	v.setState(EngineState{Looked: true, Connected: true, Ready: true, Host: host})
	v.mu.Unlock()
	select {
	case v.synced <- struct{}{}:
	default:
	}
	// The first of these to end ends the others, and the view is down until it has connected again.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return v.await(ctx, done) })
	g.Go(func() error { return v.heartbeat(ctx) })
	g.Go(func() error { return v.checkEvents(ctx) })
	g.Go(func() error { return v.renewImages(ctx) })
	for range workers {
		g.Go(func() error { return v.renewDirty(ctx, g) })
	}
	return g.Wait()
}

// host connects, within hostTimeout.
func (v *View) host(ctx context.Context) (spec.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, hostTimeout)
	defer cancel()
	return v.src.Host(ctx)
}

// heartbeat fails as soon as the engine does not answer a ping in time.
func (v *View) heartbeat(ctx context.Context) error {
	tick := time.NewTicker(HeartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if err := v.ping(ctx); err != nil {
			return err
		}
	}
}

func (v *View) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, heartbeatTimeout)
	defer cancel()
	return v.src.Ping(ctx)
}

// await waits for the end of the event stream and looks at everything now and then.
func (v *View) await(ctx context.Context, done <-chan error) error {
	resync := time.NewTicker(resyncPeriod)
	defer resync.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-done:
			if err == nil {
				err = errStreamEnded
			}
			return err
		case <-resync.C:
			if err := v.readAll(ctx, resyncPeriodic); err != nil {
				return err
			}
		case <-v.missed:
			if err := v.readAll(ctx, resyncMissed); err != nil {
				return err
			}
		}
	}
}

// renewDirty reads the containers that events have named, one after the other. g runs what takes longer.
func (v *View) renewDirty(ctx context.Context, g *errgroup.Group) error {
	for {
		id, err := v.dirty.next(ctx)
		if err != nil {
			return err
		}
		read := make(chan error, 1)
		go func() { read <- v.readOne(ctx, id) }()

		select {
		case err := <-read:
			if err := v.renewed(ctx, id, err); err != nil {
				return err
			}
			continue
		case <-time.After(slowInspect):
		}
		select {
		case v.slow <- struct{}{}: // there is room in the background
		case <-ctx.Done():
			return ctx.Err()
		}
		g.Go(func() error {
			defer func() { <-v.slow }()
			return v.renewed(ctx, id, <-read)
		})
	}
}

// renewed ends the reading of one container. It fails if the engine is not there.
func (v *View) renewed(ctx context.Context, id model.ContainerID, err error) error {
	if err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)) {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err == nil {
		delete(v.retries, id)
		return nil
	}
	// The engine is there and cannot describe this one, as happens to one that is being removed, or that hangs.
	v.retryLocked(id)
	v.log.Debug("a container cannot be described now", "id", id, "retry", v.retries[id], "err", err)
	return nil
}

// readAll reads everything, for a reason. What was read by a later look meanwhile stays.
func (v *View) readAll(ctx context.Context, reason string) error {
	v.metrics.resync(reason)
	v.reading.Store(time.Now().UnixNano())
	defer v.reading.Store(0)
	ctx, cancel := context.WithTimeout(ctx, readDeadline)
	defer cancel()
	// Images first: to read a container takes the labels of its image.
	if err := v.listImages(ctx, imagesTimeout); err != nil {
		return err
	}
	ticket := v.look()
	objects, err := v.src.Objects(ctx)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, o := range objects {
		if o.Unread != "" {
			v.retryLocked(o.Unread)
		}
		objects[i] = v.explainLocked(o)
	}
	v.tell(v.store.replace(objects, ticket))
	for _, o := range objects {
		v.watchOOMLocked(o)
	}
	return nil
}

// retryLocked has a container read again after a pause that grows each time.
func (v *View) retryLocked(id model.ContainerID) {
	pause := nextRetry(v.retries[id])
	v.retries[id] = pause
	v.dirty.mark(id, pause)
}

// nextRetry returns the pause after another failure, given the one after the last.
func nextRetry(last time.Duration) time.Duration { return min(max(2*last, retryMin), retryMax) }

// Resync reads everything anew, although no event has told of a change.
func (v *View) Resync(ctx context.Context) error { return v.readAll(ctx, resyncReload) }

// Stuck is nil while the view does its work: its lock can be had, and no look at everything takes longer than it may.
func (v *View) Stuck() error {
	v.Engine()
	if since := v.reading.Load(); since != 0 {
		if d := time.Since(time.Unix(0, since)); d > 2*readDeadline {
			return fmt.Errorf("everything is being read for %s already", d.Round(time.Second))
		}
	}
	return nil
}

func (v *View) look() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store.begin()
}

// Refresh reads the objects anew from the engine, so that the view shows what has been done; one that is gone leaves the view.
// What cannot be read now is read again later: the caller may have changed it, or an event may have named it.
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

// readOne reads one object. Its mark is gone then, so on error the caller has it read again.
func (v *View) readOne(ctx context.Context, id model.ContainerID) error {
	v.dirty.forget(id) // what was marked before this inspect is seen by it
	seen := v.metrics.looking(id)
	ticket := v.look()
	o, err := v.src.Inspect(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}

	v.mu.Lock()
	defer v.mu.Unlock()
	v.takeLocked(id, o, ticket)
	seen()
	return nil
}

// takeLocked takes what an inspect has found under an ID.
func (v *View) takeLocked(id model.ContainerID, o spec.Object, ticket uint64) {
	o = v.explainLocked(o)
	v.tell(v.store.put(id, o, ticket))
	v.watchOOMLocked(o)
}

// heed takes an event. What is gone needs no look; all else is looked at after the event was taken at its word.
func (v *View) heed(e engine.Event) {
	v.metrics.noted(e)
	v.arrived.add(e)
	if e.Missed {
		select {
		case v.missed <- struct{}{}:
		default: // it is requested already
		}
		return
	}
	if e.Image {
		v.dirtyImages.mark(allImages, settle)
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if e.Kind == engine.Destroyed {
		v.tell(v.store.gone(e.ID, e.At))
		v.dirty.forget(e.ID)
		delete(v.retries, e.ID)
		v.metrics.looking(e.ID)()
		return
	}
	v.heedOOMLocked(e)
	if steps := v.store.hear(e); len(steps) > 0 {
		v.tell(steps)
		v.metrics.looking(e.ID)()
	}
	if e.Kind == engine.Killed { // the end follows
		return
	}
	after := settle
	if e.Kind == engine.Died {
		after = 0 // no call of ours reads it
	}
	v.dirty.mark(e.ID, after)
}
