// Package daemon wires the parts by hand and runs them: it takes the lock on the root directory, listens, tells systemd, follows the engine,
// recovers what a crash left, and stops in order. Pods never notice that it starts or stops.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/cri"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/imagevolume"
	"cri-dockerd/internal/logs"
	"cri-dockerd/internal/logs/driver"
	logprocess "cri-dockerd/internal/logs/process"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/process"
	"cri-dockerd/internal/rpc"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/stream"
	"cri-dockerd/internal/tracing"
	"cri-dockerd/internal/view"
)

const (
	// startPatience is how long the first look at the engine may hold up calls, and the start of what systemd orders after us. An engine that is
	// down does not hold them up at all, one that neither answers nor refuses must not do so for ever. Engine 20.10 takes more than ten seconds
	// for GET /info while another client's pull waits for a name that DNS does not tell.
	startPatience = 30 * time.Second
	// stopGrace is for calls that run when the daemon is told to stop; systemd kills after 90 s.
	stopGrace = 10 * time.Second
	// recoverAgain is the pause after a recovery that could not clear everything; it doubles up to recoverRarely.
	recoverAgain  = time.Minute
	recoverRarely = 16 * time.Minute
	// garbage is how much of what is held may be garbage, in percent. Answers with the figures of all pods are the largest by far, and seldom asked for.
	garbage = 50
	// umask is the daemon's own, whatever that of its unit is: missing host paths of mounts are 0755, so
	// that the users of containers can read them.
	umask = 0o022
)

// Run serves the CRI until ctx ends (nil) or something fails at start or later. The engine may be down at any time. Errors say in one
// sentence what is wrong and what mends it. version is this program's.
func Run(ctx context.Context, cfg *config.Config, version string, log *slog.Logger) error {
	for _, w := range cfg.Warnings() {
		log.Warn(w)
	}
	debug.SetGCPercent(garbage)
	syscall.Umask(umask)
	klog.SetSlogLogger(log.With("from", "streaming"))
	unlock, err := process.LockDirectory("--cri-dockerd-root-directory", cfg.RootDirectory, process.HandOverTimeout)
	if err != nil {
		return err
	}
	defer unlock()
	// Two daemons with root directories of their own would still take each other's namespaces and mounts for leftovers.
	unlockRun, err := process.LockDirectory("--run-directory", cfg.RunDirectory, process.HandOverTimeout)
	if err != nil {
		return err
	}
	defer unlockRun()
	defer process.Absorb(syscall.SIGPIPE)()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	p, err := wire(cfg, version, log)
	if err != nil {
		return err
	}
	defer p.close()
	l, err := rpc.Listen(cfg.Endpoint, rpc.TLSFiles{Cert: cfg.TLSCert, Key: cfg.TLSKey, ClientCA: cfg.TLSClientCA})
	if err != nil {
		return err
	}
	if l.Addr().Network() == "tcp" && cfg.TLSCert == "" {
		log.Warn("every user of this machine can reach the CRI and is root by it; a unix socket has an owner", "address", l.Addr())
	}
	m, err := listenEndpoint(cfg.MetricsAddress)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	return p.run(ctx, l, m, hup, log)
}

// parts is what runs.
type parts struct {
	engine  *engine.Engine
	view    *view.View
	oom     *cgroup.OOMWatcher
	network podnet.Network
	plugins *podnet.Observer
	streams *stream.Server
	logs    *logs.Logs
	imageFS *imagefs.Meter

	service    *cri.Service
	server     *rpc.Server
	endpoint   *endpoint
	looked     chan struct{} // closed after the first look at the engine
	recovering busy
	recoveries *prometheus.CounterVec
	traces     *tracing.Provider // nil for none
	log        *slog.Logger
}

// wire makes the parts. Nothing connects or answers yet.
func wire(cfg *config.Config, version string, log *slog.Logger) (*parts, error) {
	p := &parts{log: log, recoveries: newRecoveries(), looked: make(chan struct{})}
	var err error
	traces, err := p.trace(cfg, version)
	if err != nil {
		return nil, err
	}
	p.engine, err = engine.New(engine.Config{
		Endpoint: cfg.DockerEndpoint, PauseImage: cfg.PauseImage, Pins: cfg.ImagePins(), PullDeadline: cfg.PullDeadline, Traces: traces, Log: log,
	})
	if err != nil {
		return nil, err
	}
	pins := podnet.NewPins(cfg.PinDirectory, cfg.PinRecords())
	if err := pins.Prepare(); err != nil {
		log.Warn("network add-ons may not see the network namespaces of all pods", "directory", cfg.PinDirectory, "err", err)
	}
	p.plugins = podnet.NewObserver(traces)
	if p.network, err = newNetwork(cfg, pins, p.plugins, log); err != nil {
		return nil, errors.Join(err, p.engine.Close())
	}
	p.view = view.New(p.engine, log)
	if p.oom, err = cgroup.NewOOMWatcher(cgroup.Host(), p.view.ObserveOOM); err != nil {
		return nil, errors.Join(err, p.network.Close(), p.engine.Close())
	}
	p.view.SetOOM(p.oom)
	p.streams, err = stream.New(stream.Config{
		Addr:    cfg.StreamingAddr,
		Runtime: streamed{p},
		Dial:    podnet.Dial,
		TLS:     stream.TLSFiles{Cert: cfg.StreamingTLSCert, Key: cfg.StreamingTLSKey},
		Spool:   func() (*os.File, error) { return openNameless(cfg.RootDirectory) },
		Log:     log,
	})
	if err != nil {
		return nil, errors.Join(err, p.network.Close(), p.engine.Close())
	}
	p.logs = logs.New(logs.Config{
		Mode: cfg.ContainerLog, Process: driver.NewClient(driver.Socket), Launch: func() (<-chan error, error) {
			return logprocess.Launch(cfg.RunDirectory, "--log-level="+cfg.LogLevel, "--log-format="+cfg.LogFormat)
		},
		Reach: p.engine.ReachLogDriver, EngineRoot: func() string { return p.view.Engine().Host.RootDir }, Version: version, Log: log,
	})
	p.imageFS = imagefs.New(log)
	p.service = cri.New(cri.Deps{
		Log: log, Engine: p.engine, View: p.view, Network: p.network, Streams: p.streams, ImageFS: p.imageFS,
		Stats:   stats.New(cgroup.Host()),
		Volumes: imagevolume.New(filepath.Join(cfg.RunDirectory, "image-volumes")),
		Pins:    pins, Logs: p.logs, EngineNetNS: cfg.EngineNetNS(),
		Checkpoints: checkpoint.New(cfg.RootDirectory, checkpoint.Dockershim),
	})
	p.server = rpc.New(rpc.Services{
		Runtime:  p.service,
		Image:    p.service,
		Log:      log,
		Validate: spec.Validate,
		Hold:     p.hold,
		Traces:   traces,
	})
	metrics, err := figures(version, p.collectors()...)
	if err != nil {
		return nil, errors.Join(err, p.streams.Close(), p.network.Close(), p.engine.Close())
	}
	p.endpoint = &endpoint{metrics: metrics, alive: p.alive(), ready: p.ready(), log: log}
	return p, nil
}

// openNameless makes a file in dir that is gone when it is closed (O_TMPFILE, open(2)).
func openNameless(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
}

// streamed is what the streaming server is connected to. The service needs the server, so it comes later. Requests that reach the
// server carry the IDs that the service put into them.
type streamed struct{ p *parts }

func (s streamed) Exec(ctx context.Context, id string, x engine.Exec) (int, error) {
	ctx, stop := s.p.service.WhileRunning(ctx, id)
	defer stop()
	return s.p.engine.Exec(ctx, model.ContainerID(id), x)
}

func (s streamed) Attach(ctx context.Context, id string, x engine.Streams) error {
	ctx, stop := s.p.service.WhileRunning(ctx, id)
	defer stop()
	return s.p.engine.Attach(ctx, model.ContainerID(id), x)
}

func (s streamed) OpenNetNS(sandboxID string) (*os.File, error) {
	return s.p.service.OpenNetNS(sandboxID)
}

func newNetwork(cfg *config.Config, pins *podnet.Pins, observer *podnet.Observer, log *slog.Logger) (podnet.Network, error) {
	switch cfg.NetworkPlugin {
	case "cni":
		return podnet.NewCNI(podnet.CNIConfig{
			ConfDir:  cfg.CNIConfDir,
			BinDirs:  cfg.CNIBinDirs,
			CacheDir: cfg.CNICacheDir,
			Pins:     pins,
			Observer: observer,
			Log:      log,
		})
	case "kubenet":
		return podnet.NewKubenet(podnet.KubenetConfig{
			BinDirs:  cfg.CNIBinDirs,
			CacheDir: cfg.CNICacheDir,
			Pins:     pins,
			PodCIDRs: cfg.CIDRs(),
			MTU:      cfg.MTU,
			Hairpin:  cfg.HairpinMode,
			Observer: observer,
			Log:      log,
		})
	}
	return podnet.NewNoop(log), nil
}

// run runs the parts, with the CRI on l and the endpoint on metrics, until ctx ends or one fails. A signal on hup reloads.
func (p *parts) run(ctx context.Context, l, metrics net.Listener, hup <-chan os.Signal, log *slog.Logger) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ignoreEnd(p.view.Run(ctx)) })
	g.Go(func() error { return ignoreEnd(p.oom.Run(ctx)) })
	g.Go(func() error { p.logs.Run(ctx); return nil })
	g.Go(func() error { p.network.Run(ctx); return nil })
	g.Go(func() error { p.imageFS.Run(ctx); return nil })
	g.Go(func() error { p.recoverLoop(ctx); return nil })
	g.Go(func() error { p.service.CompleteStarts(ctx); return nil })
	g.Go(func() error { p.reloadLoop(ctx, hup); return nil })
	g.Go(p.streams.Serve)
	g.Go(func() error {
		defer close(p.looked)
		p.awaitEngine(ctx, startPatience, isAttempted)
		return nil
	})
	g.Go(func() error {
		// Until then calls wait in the socket: better than an answer that nothing is known.
		p.awaitEngine(ctx, startPatience, isAnswered)
		if err := process.DropProgramPages(); err != nil {
			log.Debug("the program stays in memory as a whole", "err", err)
		}
		log.Info("serving the CRI", "at", l.Addr().String())
		return p.server.Serve(l)
	})
	begun := make(chan struct{})
	g.Go(func() error { defer close(begun); <-p.looked; p.awaitLogs(ctx, startPatience); return nil })
	g.Go(func() error { return p.notifySystemd(ctx, begun) })
	g.Go(func() error { return p.endpoint.serve(ctx, metrics) })
	g.Go(func() error {
		<-ctx.Done()
		log.Info("stopping; pods go on")
		err := process.Notify(process.Stopping)
		p.server.Stop(stopGrace)
		return errors.Join(err, p.streams.Close())
	})
	return g.Wait()
}

// hold keeps calls back until it is known what runs, or that the engine is down. Version and
// RuntimeConfig are answered as soon as the engine is connected.
func (p *parts) hold(ctx context.Context, method string) error {
	if method == "Version" || method == "RuntimeConfig" {
		return nil
	}
	select {
	case <-p.looked:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// isAttempted says whether it is known what runs, or that the engine is down.
func isAttempted(e view.EngineState) bool { return e.Attempted }

// isAnswered says whether the engine has answered, or is down.
func isAnswered(e view.EngineState) bool { return e.Connected || e.Attempted }

// awaitEngine waits until the engine is in a state, at most for timeout.
func (p *parts) awaitEngine(ctx context.Context, timeout time.Duration, reached func(view.EngineState) bool) {
	late := time.NewTimer(timeout)
	defer late.Stop()
	for {
		changed := p.view.Changed()
		if reached(p.view.Engine()) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-late.C:
			return
		case <-changed:
		}
	}
}

// awaitLogs waits until it is known how containers are logged, at most for patience: until then the node is not ready, which whoever is ordered
// after us need not see. An engine that is down is not waited for.
func (p *parts) awaitLogs(ctx context.Context, patience time.Duration) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		changed := p.view.Changed()
		if !p.view.Engine().Ready {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-late.C:
			return
		case <-p.logs.Decided():
			return
		case <-changed:
		}
	}
}

// recoverLoop clears what a crash left whenever the view has been read anew, and again later what could not be cleared.
func (p *parts) recoverLoop(ctx context.Context) {
	again := time.NewTimer(recoverAgain)
	again.Stop()
	defer again.Stop()
	pause := recoverAgain
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.view.Synced():
			p.logs.EngineConnected()
			pause = recoverAgain
		case <-again.C:
		case <-p.service.Leftovers():
			pause = recoverAgain
		}
		p.recovering.begin()
		err := p.service.Recover(ctx)
		p.recovering.end()
		if ctx.Err() != nil {
			return
		}
		p.recoveries.WithLabelValues(result(err)).Inc()
		if err != nil {
			p.log.Warn("not all leftovers could be cleared; trying again", "in", pause, "err", err)
			again.Reset(pause)
			pause = min(2*pause, recoverRarely)
		}
	}
}

func (p *parts) close() {
	closers := []interface{ Close() error }{p.streams, p.network, p.engine}
	if p.traces != nil {
		closers = append(closers, p.traces)
	}
	for _, c := range closers {
		if err := c.Close(); err != nil {
			p.log.Debug("close", "err", err)
		}
	}
}

func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

func ignoreEnd(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
