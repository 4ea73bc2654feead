// Package engine is the client for Docker Engine. It wraps Docker's own Go client in the types of
// package model and adds features missing there: a non-blocking event stream, a progress deadline
// for pulls, exec with a kill on timeout, and the embedded pause image. Only engine, translate and
// view depend on Docker's types.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/engine/output"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// Config configures an Engine.
type Config struct {
	// Endpoint is unix:///path, tcp://host:port or npipe://…. If it is empty, DOCKER_HOST and its
	// related variables apply.
	Endpoint string
	// PauseImage is the sandbox image. Empty selects the embedded one.
	PauseImage string
	// AuthDir is the directory of the config.json with the registry credentials of this machine.
	// Empty selects Docker's default.
	AuthDir string
	// PullDeadline cancels an image pull that makes no progress for this long.
	PullDeadline time.Duration
	// Dial connects to the engine, except for streams. It does not support TLS. Nil selects the
	// dialer of Docker's client.
	Dial func(ctx context.Context) (net.Conn, error)
	// Traces receives a span for every request. It may be nil.
	Traces trace.TracerProvider
	// Units is systemd, which owns the control groups of containers with Docker's systemd driver.
	// Nil means that there is none.
	Units Units
	// Containers is the value of --containers. Empty means engine.
	Containers string
	// OutputDirectory is for the output of execs from the shim. Empty means that all output comes
	// from the engine.
	OutputDirectory string
	// Adjustments is the directory with the adjustments of NRI plugins for the shim. It is empty
	// without plugins; records have no processes then.
	Adjustments string
	// Pins are the images pinned by the operator.
	Pins model.ImagePins
	Log  *slog.Logger
}

// Engine is the connection to one Docker Engine. It is safe for concurrent use.
type Engine struct {
	cfg      Config
	client   atomic.Pointer[connection] // replaced by each call of Host
	kernel   cgroup.Kernel
	images   imageCache
	pulls    callGroup[string]
	accounts accountCache
	metrics  pullMetrics
	activity activity // of all pulls
	calls    *prometheus.HistogramVec
	loading  keylock.Map            // one load of the pause image at a time
	arch     atomic.Pointer[string] // the engine's architecture; set by the first Host
	skipped  reportedObjects
	pauseID  atomic.Pointer[model.ImageID] // of the embedded pause image; nil while unknown
	execs    execTimeouts
	logCheck logCheckTimeouts

	leftovers      *output.Leftovers // of sessions of an earlier process
	inspectTimeout time.Duration     // of one inspect; tests change it
	reaps          reaps
}

// New returns an Engine without connecting to it. The engine may start later, and its version may
// change when it restarts.
func New(cfg Config) (*Engine, error) {
	e := &Engine{
		cfg:     cfg,
		kernel:  cgroup.Host(),
		images:  newImageCache(),
		metrics: newPullMetrics(),
		calls:   newCallMetrics(),
		execs:   defaultExecTimeouts,

		logCheck:       defaultLogCheckTimeouts,
		inspectTimeout: inspectTimeout,
	}

	docker, err := e.newClient()
	if err != nil {
		return nil, err
	}

	e.client.Store(docker)
	if cfg.OutputDirectory == "" {
		return e, nil
	}

	if e.leftovers, err = output.FindLeftovers(cfg.OutputDirectory); err != nil {
		cfg.Log.Warn("cannot read the output of a command without a session; it may block", "err", err)
	}

	return e, nil
}

func (e *Engine) newClient() (*connection, error) {
	host := client.WithHost(e.cfg.Endpoint)
	if e.cfg.Endpoint == "" {
		host = client.FromEnv
	}

	docker, err := newConnection(e.cfg.Dial, []client.Opt{host}, client.WithUserAgent("cri-dockerd"),
		withObservation(e.cfg.Traces, e.calls))
	if err != nil {
		return nil, fmt.Errorf("--docker-endpoint %q: %w", e.cfg.Endpoint, err)
	}

	return docker, nil
}

func (e *Engine) docker() *client.Client { return e.client.Load().Client }

// streams returns the client for hijacked connections.
func (e *Engine) streams() *client.Client { return e.client.Load().streams }

// DiscardLeftovers lets the commands of lost sessions continue without their clients. It returns
// after their end, or that of ctx.
func (e *Engine) DiscardLeftovers(ctx context.Context) {
	if e.leftovers != nil {
		e.leftovers.Discard(ctx, copyDirect)
	}
}

// Close stops the reaping of cancelled execs and closes idle connections.
func (e *Engine) Close() error {
	e.reaps.close()
	return e.client.Load().Close()
}

// minAPI is the API version of Docker Engine 20.10.
const minAPI = "1.41"

// Host connects to the engine, negotiates the API version, and reads the engine's properties (GET
// /_ping, /info). Errors are Unavailable if the engine does not respond, and FailedPrecondition if
// it is too old.
func (e *Engine) Host(ctx context.Context) (model.Host, error) {
	// Use a new client: a second negotiation would change the version of calls in progress, and it
	// could only lower the version.
	docker, err := e.newClient()
	if err != nil {
		return model.Host{}, err
	}

	if _, err := docker.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		return model.Host{}, errors.Join(wrap(err, "ping the engine at %s", docker.DaemonHost()), docker.Close())
	}

	// Close affects idle connections only; calls in progress continue.
	if err := e.client.Swap(docker).Close(); err != nil {
		e.cfg.Log.Debug("failed to close idle connections to the engine", "err", err)
	}

	info, err := e.info(ctx)
	if err != nil {
		return model.Host{}, wrap(err, "get engine information")
	}

	h := translate.ReadHost(info, e.docker().ClientVersion(), minOOMScore("/proc/self"))
	e.arch.Store(&h.Architecture)
	if e.activity.store.Store(nil); h.ContainerdStore {
		e.activity.store.Store(&h.RootDir)
	}

	if !h.AtLeast(minAPI) {
		return h, fmt.Errorf("engine %s supports API version %s; version %s or later is required "+
			"(Docker Engine 20.10): %w", h.EngineVersion, h.APIVersion, minAPI, errdefs.ErrFailedPrecondition)
	}

	h.Shim = newShim(e.cfg.Containers, h)

	return h, nil
}

// capSysResource is the bit of CAP_SYS_RESOURCE. A process needs this capability to lower an
// oom_score_adj (capabilities(7), proc(5)).
const capSysResource = 24

// minOOMScore returns the lowest possible oom_score_adj of a container on this machine. It derives
// the value from the capabilities and the score of this process, because the same restrictions
// apply to an engine beside it.
func minOOMScore(proc string) int {
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return -1000
	}

	for line := range strings.Lines(string(status)) {
		hex, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}

		caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil || caps&(1<<capSysResource) != 0 {
			return -1000
		}
	}

	own, err := os.ReadFile(proc + "/oom_score_adj")
	if err != nil {
		return 0
	}

	score, err := strconv.Atoi(strings.TrimSpace(string(own)))
	if err != nil {
		return 0
	}

	return score
}

// wrap adds the operation to an error of Docker's client. An error without a response of the engine
// becomes Unavailable.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}

	op := fmt.Sprintf(format, args...)
	if client.IsErrConnectionFailed(err) {
		err = asUnavailable(err)
	}

	return fmt.Errorf("%s: %w", op, err)
}

// unavailableError is an error of the kind Unavailable. Its text does not contain the kind: each
// caller would repeat it.
type unavailableError struct{ error }

// Unwrap returns the error and its kind.
func (e unavailableError) Unwrap() []error { return []error{e.error, errdefs.ErrUnavailable} }

// asUnavailable returns err with the kind Unavailable.
func asUnavailable(err error) error {
	if errdefs.IsUnavailable(err) {
		return err
	}
	return unavailableError{err}
}

// isUnanswered reports whether the engine did not respond, as opposed to an error response about
// one object.
func isUnanswered(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errdefs.IsUnavailable(err)
}

// ignore returns err, or nil if err is of the given kind.
func ignore(err error, kind func(error) bool) error {
	if err != nil && kind(err) {
		return nil
	}
	return err
}
