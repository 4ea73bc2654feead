package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"cri-dockerd/internal/apparmor"
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
	"cri-dockerd/internal/nri"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/podstats"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/rpc"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/stream"
	"cri-dockerd/internal/systemd"
	"cri-dockerd/internal/tracing"
	"cri-dockerd/internal/undo"
	"cri-dockerd/internal/validate"
	"cri-dockerd/internal/view"
)

// parts are the parts of a daemon.
type parts struct {
	cfg     *config.Config
	version string
	log     *slog.Logger
	undo    undo.Stack // closes the parts

	traces  trace.TracerProvider // nil for none
	units   *systemd.Manager
	engine  *engine.Engine
	view    *view.View
	oom     *cgroup.OOMWatcher
	exits   *proc.Exits
	network *podnet.Manager
	plugins *podnet.Observer
	streams *stream.Server
	logs    *logs.Logs
	imageFS *imagefs.Meter
	stats   *podstats.Reporter

	nri        *nri.Runtime // nil without NRI plugins
	nriStore   *nri.Store
	service    *cri.Service
	server     *rpc.Server
	endpoint   *endpoint
	known      chan struct{} // closed after the first read of the engine, successful or not
	recovery   recoveryTimer
	recoveries *prometheus.CounterVec

	listener        net.Listener // of the CRI
	metricsListener net.Listener // nil for none
}

// wire creates the parts without connecting or serving. The caller must close them. wire closes
// them itself before it returns an error.
func wire(cfg *config.Config, version string, log *slog.Logger) (*parts, error) {
	p := newParts(cfg, version, log)
	if err := p.acquire(p.steps()); err != nil {
		return nil, err
	}
	return p, nil
}

func newParts(cfg *config.Config, version string, log *slog.Logger) *parts {
	return &parts{
		cfg:        cfg,
		version:    version,
		log:        log,
		known:      make(chan struct{}),
		recoveries: newRecoveries(),
	}
}

// steps returns the steps of wire in order. Each step registers its resources with closeLater.
func (p *parts) steps() []func() error {
	return []func() error{
		p.openTraces,
		p.openEngine,
		p.openNetwork,
		p.openView,
		p.openStreams,
		p.openNRI,
		p.openService,
		p.openServer,
		p.listen,
		p.listenMetrics,
	}
}

func (p *parts) acquire(steps []func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return errors.Join(err, p.close())
		}
	}
	return nil
}

// closeLater registers a part for close. close starts with the last part.
func (p *parts) closeLater(name string, c io.Closer) {
	p.undo.Push(name, func(context.Context) error {
		if err := c.Close(); !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) {
			return err
		}
		return nil // already closed
	})
}

func (p *parts) close() error { return p.undo.Run(context.Background(), stopGrace) }

// openTraces creates the trace provider. Without --tracing-endpoint it remains nil, to avoid any
// overhead.
func (p *parts) openTraces() error {
	if p.cfg.TracingEndpoint == "" {
		return nil
	}

	name, err := os.Hostname()
	if err != nil {
		return err
	}

	provider, err := tracing.New(context.Background(), tracing.Config{
		Endpoint:   p.cfg.TracingEndpoint,
		PerMillion: p.cfg.TracingRate,
		Node:       name,
		Version:    strings.TrimPrefix(p.version, "cri-dockerd "),
		Log:        p.log,
	})
	if err != nil {
		return err
	}

	p.closeLater("traces", provider)
	p.traces = provider

	return nil
}

func (p *parts) openEngine() (err error) {
	p.units = systemd.New(systemd.PrivateSocket, p.log)
	p.closeLater("systemd", p.units)
	p.engine, err = engine.New(engine.Config{
		Endpoint:        p.cfg.DockerEndpoint,
		PauseImage:      p.cfg.PauseImage,
		Containers:      p.cfg.Containers,
		OutputDirectory: p.cfg.ExecOutput(),
		Adjustments:     p.adjustments(),
		Pins:            p.cfg.ImagePins(),
		PullDeadline:    p.cfg.PullDeadline,
		Traces:          p.traces,
		Units:           p.units,
		Log:             p.log,
	})
	if err != nil {
		return err
	}

	p.closeLater("engine", p.engine)

	return nil
}

func (p *parts) openNetwork() error {
	pins := podnet.NewPins(p.cfg.PinDirectory, p.cfg.PinRecords())
	if err := pins.Prepare(); err != nil {
		p.log.Warn("network add-ons may not have access to the network namespaces of all pods",
			"directory", p.cfg.PinDirectory, "err", err)
	}

	p.plugins = podnet.NewObserver(p.traces)
	network, err := newNetwork(p.cfg, pins, p.plugins, p.log)
	if err != nil {
		return err
	}

	p.network = podnet.NewManager(podnet.ManagerConfig{
		Network:     network,
		Namespaces:  pins,
		Pins:        pins,
		Checkpoints: checkpoint.New(p.cfg.RootDirectory, checkpoint.Dockershim),
		Log:         p.log,
	})

	p.closeLater("network", p.network)

	return nil
}

func newNetwork(
	cfg *config.Config, pins *podnet.Pins, observer *podnet.Observer, log *slog.Logger,
) (podnet.Network, error) {
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

func (p *parts) openView() (err error) {
	p.view = view.New(p.engine, p.log)
	if p.oom, err = cgroup.NewOOMWatcher(cgroup.Host(), p.view.ObserveOOM); err != nil {
		return err
	}

	p.closeLater("watcher for OOM kills", p.oom)
	p.view.SetOOM(p.oom)

	if p.exits, err = proc.NewExits(proc.Host()); err != nil {
		return err
	}

	p.closeLater("watcher for exits", p.exits)
	p.view.SetExits(p.exits)

	return nil
}

func (p *parts) openService() error {
	p.logs = logs.New(logs.Config{
		Mode:       p.cfg.ContainerLog,
		Process:    driver.NewClient(driver.Socket),
		Launch:     p.launchLogDriver,
		Reach:      p.engine.ReachLogDriver,
		EngineRoot: func() string { return p.view.Engine().Host.RootDir },
		Version:    p.version,
		Log:        p.log,
	})

	p.imageFS = imagefs.New(p.log)
	usage := stats.New(cgroup.Host())
	p.stats = podstats.New(podstats.Config{
		View:    view.Visible{View: p.view},
		Usage:   usage,
		Details: usage,
		ImageFS: p.imageFS,
		Log:     p.log,
	})

	p.service = cri.New(cri.Deps{
		Log:         p.log,
		Engine:      p.engine,
		Images:      p.engine,
		Accounts:    p.engine,
		Checkpoints: p.engine,
		View:        p.view,
		States:      p.view,
		Updates:     p.view,
		ImageView:   p.view,
		Network:     p.network,
		Node:        p.network,
		Reclaimer:   p.network,
		Streams:     p.streams,
		AppArmor:    apparmor.Host(),
		Stats:       p.stats,
		Volumes:     imagevolume.New(filepath.Join(p.cfg.RunDirectory, "image-volumes")),
		Logs:        p.logs,
		Concealer:   p.view,
		Visible:     view.Visible{View: p.view},
		Plugins:     p.nriPlugins(),
		PluginStore: p.nriStore,
		EngineNetNS: p.cfg.EngineNetNS(),
	})

	return nil
}

func (p *parts) launchLogDriver() (ended <-chan error, err error) {
	return logprocess.Launch(p.cfg.RunDirectory, "--log-level="+p.cfg.LogLevel, "--log-format="+p.cfg.LogFormat)
}

func (p *parts) openServer() error {
	p.server = rpc.New(rpc.Services{
		Runtime:  p.service,
		Image:    p.service,
		Log:      p.log,
		Validate: validate.Request,
		Hold:     p.hold,
		Traces:   p.traces,
	})

	registry, err := newRegistry(p.version, p.collectors()...)
	if err != nil {
		return err
	}

	p.endpoint = &endpoint{
		metrics: registry,
		alive:   p.alive(),
		ready:   p.ready(),
		log:     p.log,
	}

	return nil
}

func (p *parts) listen() (err error) {
	p.listener, err = rpc.Listen(p.cfg.Endpoint, rpc.TLSFiles{
		Cert:     p.cfg.TLSCert,
		Key:      p.cfg.TLSKey,
		ClientCA: p.cfg.TLSClientCA,
	})
	if err != nil {
		return err
	}

	p.closeLater("listener of the CRI", p.listener)
	if p.listener.Addr().Network() == "tcp" && p.cfg.TLSCert == "" {
		p.log.Warn("the CRI endpoint has no access control: every local user can become root through it; use a unix "+
			"socket", "address", p.listener.Addr())
	}

	return nil
}

func (p *parts) listenMetrics() (err error) {
	p.metricsListener, err = listenEndpoint(p.cfg.MetricsAddress)
	if err != nil || p.metricsListener == nil {
		return err
	}
	p.closeLater("listener of the metrics", p.metricsListener)
	return nil
}
