// Package view holds sandboxes, containers and images of this node in memory. Docker is the source
// of truth: the view reads its objects and follows its events. Every List and Status RPC is
// answered from the view.
package view

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// Source is the part of the engine that the view reads.
type Source interface {
	// Host connects and describes the engine.
	Host(ctx context.Context) (model.Host, error)
	// TryShim returns whether pods can run under the containerd shim, if Host has not decided it.
	TryShim(ctx context.Context) (model.Shim, error)
	// Ping fails if the engine does not answer before ctx ends.
	Ping(ctx context.Context) error
	// Objects reads all managed containers. An object that cannot be described in time is Unread.
	Objects(ctx context.Context) ([]model.Object, error)
	// Inspect reads one container. It returns NotFound if the container does not exist, and an
	// empty object if it is not managed by this daemon.
	Inspect(ctx context.Context, id model.ContainerID) (model.Object, error)
	// Images reads all images. An image that is not described in time is Stale.
	Images(ctx context.Context) ([]*model.Image, error)
	// Image reads one image by its name or ID. It returns NotFound if there is none.
	Image(ctx context.Context, ref string) (*model.Image, error)
	// EventsBetween returns the events of a period that the engine remembers, in the same form as
	// Events.
	EventsBetween(ctx context.Context, since, until time.Time) ([]engine.Event, error)
	// Events subscribes before it returns. changed must not block. done delivers the end of the
	// stream once.
	Events(ctx context.Context, changed func(engine.Event)) (done <-chan error)
}

// EngineState is the state of the connection to Docker.
type EngineState struct {
	// Attempted is set once the daemon has tried to read the engine, with any result.
	Attempted bool
	// Connected is set once the engine has answered and Host is valid. Ready implies it.
	Connected bool
	Ready     bool   // events arrive and the view is complete
	Reason    string // why the engine is not ready; "" when Ready
	Host      model.Host
}

// View is the state of the node. It is safe for concurrent use.
type View struct {
	src    Source
	log    *slog.Logger
	synced chan struct{} // one element after the first full read of each connection

	pending       *queue[model.ContainerID] // containers to be read
	pendingImages *queue[string]            // one element stands for all images
	pendingRefs   *queue[string]            // names and IDs of images to be read
	updated       *queue[model.ContainerID] // containers whose limits may have been replaced
	missed        chan struct{}             // an element after events were lost
	arrived       arrivals
	slow          chan struct{} // one element per inspection waiting in the background
	oom           OOM
	exits         Exits
	metrics       *viewMetrics
	// start of the current full read in nanoseconds of Unix time; 0: none
	reading atomic.Int64

	mu      sync.RWMutex // guards all below
	state   EngineState
	changed chan struct{} // closed with the next change of state
	store   store
	images  imageStore
	retries map[model.ContainerID]time.Duration // the last delay before a failed read is retried
	// imagesRetry is the corresponding delay for the list of images.
	imagesRetry time.Duration

	watches   map[*Watch]struct{}
	lastStamp time.Time // the latest time given to a published pod
	ended     bool
}

// New returns an empty view. It is not ready until Run has connected.
func New(src Source, log *slog.Logger) *View {
	return &View{
		src:           src,
		log:           log,
		oom:           noOOM{},
		exits:         noExits{},
		synced:        make(chan struct{}, 1),
		pending:       newQueue[model.ContainerID](),
		pendingImages: newQueue[string](),
		pendingRefs:   newQueue[string](),
		updated:       newQueue[model.ContainerID](),
		missed:        make(chan struct{}, 1),
		slow:          make(chan struct{}, slowInspects),
		metrics:       newViewMetrics(),
		state:         EngineState{Reason: "not yet connected to Docker"},
		changed:       make(chan struct{}),
		store:         newStore(),
		images:        newImageStore(),
		retries:       map[model.ContainerID]time.Duration{},
		watches:       map[*Watch]struct{}{},
	}
}

// Synced delivers an element after every full read of a new connection.
func (v *View) Synced() <-chan struct{} { return v.synced }

// Engine returns the state of the connection.
func (v *View) Engine() EngineState {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.state
}

// Changed returns a channel closed at the next change of Engine.
func (v *View) Changed() <-chan struct{} {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.changed
}

// setConnected publishes the description of the engine before the first read of its containers. A
// ready view stays ready.
func (v *View) setConnected(host model.Host) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.state
	s.Connected, s.Host = true, host
	v.setStateLocked(s)
}

// setShim publishes the result of a trial of the containerd shim.
func (v *View) setShim(shim model.Shim) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.state
	s.Host.Shim = shim
	v.setStateLocked(s)
}

func (v *View) setReady(host model.Host) {
	v.mu.Lock()
	v.setStateLocked(EngineState{Attempted: true, Connected: true, Ready: true, Host: host})
	v.mu.Unlock()

	select {
	case v.synced <- struct{}{}:
	default:
	}
}

func (v *View) setDown(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()

	reason := fmt.Sprintf("Docker does not answer: %v; start it (systemctl start docker) or correct --docker-endpoint",
		err)
	if errdefs.IsFailedPrecondition(err) {
		reason = err.Error()
	}

	v.setStateLocked(EngineState{Attempted: true, Reason: reason, Host: v.state.Host})
}

func (v *View) setStateLocked(s EngineState) {
	if s.Ready != v.state.Ready || s.Connected != v.state.Connected || s.Reason != v.state.Reason ||
		s.Host.Shim != v.state.Host.Shim {
		close(v.changed)
		v.changed = make(chan struct{})
	}
	v.state = s
}

// CheckProgress returns an error if the view is stuck: a full read takes longer than its deadline
// allows. It blocks while the lock of the view cannot be taken.
func (v *View) CheckProgress() error {
	v.Engine()
	if since := v.reading.Load(); since != 0 {
		if d := time.Since(time.Unix(0, since)); d > 2*readDeadline {
			return fmt.Errorf("a full read of the engine has been running for %s", d.Round(time.Second))
		}
	}
	return nil
}
