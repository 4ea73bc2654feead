// Package engine is Docker Engine as this program uses it: Docker's own Go client, its verbs in the
// vocabulary of spec, and what the client lacks: an event stream that never blocks, pulls that end
// when nothing moves, exec that kills what it started, and the embedded pause image. Only engine,
// spec and node know Docker's types.
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
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Config says which engine to speak to and how.
type Config struct {
	// Endpoint is unix:///path, tcp://host:port or npipe://…; empty means DOCKER_HOST and its
	// companions.
	Endpoint string
	// PauseImage is the sandbox image; empty means the embedded one.
	PauseImage string
	// AuthDir is the folder of the config.json with this machine's credentials; empty means
	// Docker's own default.
	AuthDir string
	// PullDeadline ends a pull in which nothing at all has moved for so long.
	PullDeadline time.Duration
	// Dial connects to the engine, except for streams; nil for Docker's own client. It is not for
	// TLS.
	Dial func(ctx context.Context) (net.Conn, error)
	// Traces gets a span for every request; nil for none.
	Traces trace.TracerProvider
	// Pins are the images that the operator wants to keep.
	Pins spec.ImagePins
	Log  *slog.Logger
}

// Engine is the connection to one Docker Engine. It is safe for concurrent use.
type Engine struct {
	cfg     Config
	client  atomic.Pointer[connection] // of the last Host; see there
	kernel  cgroup.Kernel
	images  imageCache
	pulls   shared
	metrics pullMetrics
	moving  movement // of all pulls
	calls   *prometheus.HistogramVec
	loading keylock.Map            // one load of the pause image at a time
	arch    atomic.Pointer[string] // the engine's architecture, known since the first Host
	leftOut leftOut
	pauseID atomic.Pointer[model.ImageID] // of the embedded pause, as soon as it is known
	execs   execTimeouts

	inspectTimeout time.Duration // for one inspect; tests change it
	reaps          reaps
}

// New prepares the connection. It does not connect: the engine may come later, and may be another
// version after its restart.
func New(cfg Config) (*Engine, error) {
	e := &Engine{
		cfg:     cfg,
		kernel:  cgroup.Host(),
		images:  newImageCache(),
		metrics: newPullMetrics(),
		calls:   newCallMetrics(),
		execs:   defaultExecTimeouts,

		inspectTimeout: inspectTimeout,
	}

	docker, err := e.newClient()
	if err != nil {
		return nil, err
	}

	e.client.Store(docker)

	return e, nil
}

func (e *Engine) newClient() (*connection, error) {
	host := client.WithHost(e.cfg.Endpoint)
	if e.cfg.Endpoint == "" {
		host = client.FromEnv
	}

	docker, err := newConnection(e.cfg.Dial, []client.Opt{host}, client.WithUserAgent("cri-dockerd"),
		observed(e.cfg.Traces, e.calls))
	if err != nil {
		return nil, fmt.Errorf("--docker-endpoint %q: %w", e.cfg.Endpoint, err)
	}

	return docker, nil
}

func (e *Engine) docker() *client.Client { return e.client.Load().Client }

// streams is the client for connections that are taken over.
func (e *Engine) streams() *client.Client { return e.client.Load().streams }

// Close ends what waits for execs, and idle connections.
func (e *Engine) Close() error {
	e.reaps.close()
	return e.client.Load().Close()
}

// minAPI is Engine 20.10's.
const minAPI = "1.41"

// Host connects, negotiates the API version anew, and reads what the engine is (GET /_ping, /info).
// Errors are Unavailable when the engine does not answer, FailedPrecondition when it is too old.
func (e *Engine) Host(ctx context.Context) (spec.Host, error) {
	// A new client, since one that negotiates again would change under the hands of calls that are
	// under way, and only ever downwards.
	docker, err := e.newClient()
	if err != nil {
		return spec.Host{}, err
	}

	if _, err := docker.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		return spec.Host{}, errors.Join(wrap(err, "ping the engine at %s", docker.DaemonHost()), docker.Close())
	}

	if err := e.client.Swap(docker).Close(); err != nil { // its idle connections; calls go on
		e.cfg.Log.Debug("connections to the engine are not closed", "err", err)
	}

	info, err := e.info(ctx)
	if err != nil {
		return spec.Host{}, wrap(err, "read the engine's information")
	}

	h := spec.ReadHost(info, e.docker().ClientVersion(), minOOMScore("/proc/self"))
	e.arch.Store(&h.Architecture)
	if e.moving.store.Store(nil); h.ContainerdStore {
		e.moving.store.Store(&h.RootDir)
	}

	if !h.AtLeast(minAPI) {
		return h, fmt.Errorf("engine %s speaks API %s, at least %s is needed (Docker Engine 20.10): %w",
			h.EngineVersion, h.APIVersion, minAPI, errdefs.ErrFailedPrecondition)
	}

	return h, nil
}

// capSysResource is the bit of CAP_SYS_RESOURCE, without which a process cannot lower an
// oom_score_adj (capabilities(7), proc(5)).
const capSysResource = 24

// minOOMScore is the lowest oom_score_adj that a container can get on this machine, from our own
// capabilities and score: an engine beside us is bound like ourselves.
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

// wrap adds the operation to an error of the client's, and the kind Unavailable to one that came
// before any answer.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}

	op := fmt.Sprintf(format, args...)
	if client.IsErrConnectionFailed(err) && !errdefs.IsUnavailable(err) {
		return fmt.Errorf("%s: %w: %w", op, errdefs.ErrUnavailable, err)
	}

	return fmt.Errorf("%s: %w", op, err)
}

// unanswered says whether an error means that the engine did not answer, rather than that it
// answered with an error about one object.
func unanswered(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errdefs.IsUnavailable(err)
}

// ignore is err unless it is of the kind.
func ignore(err error, kind func(error) bool) error {
	if err != nil && kind(err) {
		return nil
	}
	return err
}
