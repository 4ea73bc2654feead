// Package daemon wires the parts by hand, listens, tells systemd, recovers after each connection to Docker, and stops gracefully. Pods are
// never touched by a start or a stop.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"cri-dockerd/internal/config"
	"cri-dockerd/internal/cri"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/logs"
	"cri-dockerd/internal/node"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/rpc"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stream"
)

const (
	stopGrace       = 10 * time.Second // for calls under way
	recoverDeadline = 5 * time.Minute
)

// Run serves until ctx ends or a signal asks to stop. The error is one sentence with its remedy.
func Run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	klog.SetSlogLogger(log) // the streaming library's log
	for _, w := range cfg.Warnings() {
		log.Warn(w)
	}
	unlock, err := lock(cfg.RootDirectory)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP) // CNI configuration is watched, flags need a restart: nothing to do, and never a reason to die
	defer signal.Stop(hup)

	p, err := build(cfg, log)
	if err != nil {
		return err
	}
	defer p.close()
	listener, err := rpc.Listen(cfg.Endpoint, rpc.TLSFiles{Cert: cfg.TLSCert, Key: cfg.TLSKey, ClientCA: cfg.TLSClientCA})
	if err != nil {
		return err
	}
	server := rpc.New(rpc.Services{Runtime: p.cri, Image: p.cri, Validate: spec.Validate, Log: log})

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ended(p.view.Run(ctx)) })
	g.Go(func() error { return server.Serve(listener) })
	g.Go(p.streams.Serve)
	g.Go(func() error { recoverAfterSync(ctx, p, log); return nil })
	g.Go(func() error { return watchdog(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		_, _ = sd.SdNotify(false, sd.SdNotifyStopping)
		log.Info("stopping; pods go on")
		server.Stop(stopGrace)
		return p.streams.Close()
	})
	log.Info("serving the CRI", "endpoint", cfg.Endpoint)
	if _, err := sd.SdNotify(false, sd.SdNotifyReady); err != nil {
		log.Warn("tell systemd that the service is ready", "err", err)
	}
	return g.Wait()
}

// parts are what build makes and close ends.
type parts struct {
	engine  *engine.Engine
	view    *node.View
	network podnet.Network
	streams *stream.Server
	cri     *cri.Service
}

func (p *parts) close() {
	_ = p.network.Close()
	_ = p.engine.Close()
}

func build(cfg *config.Config, log *slog.Logger) (*parts, error) {
	e, err := engine.New(engine.Config{Endpoint: cfg.DockerEndpoint, PauseImage: cfg.PauseImage, PullDeadline: cfg.PullDeadline, Log: log})
	if err != nil {
		return nil, err
	}
	network, err := newNetwork(cfg, log)
	if err != nil {
		return nil, err
	}
	p := &parts{engine: e, view: node.New(e, log), network: network}
	p.streams, err = stream.New(stream.Config{Addr: cfg.StreamingHostPort(), Runtime: targets{p}, Dial: podnet.Dial, Log: log})
	if err != nil {
		return nil, errors.Join(err, network.Close())
	}
	p.cri = cri.New(cri.Deps{
		Log: log, Engine: e, View: p.view, Network: network, Pins: podnet.NewPins(filepath.Join(cfg.RunDirectory, "netns")),
		Logs: logs.NewSymlinks(log), Streams: p.streams,
	})
	return p, nil
}

// targets are where streams lead: the engine, and a pod's network namespace.
type targets struct{ *parts }

func (t targets) Exec(ctx context.Context, id string, x engine.Exec) (int, error) {
	return t.engine.Exec(ctx, id, x)
}

func (t targets) Attach(ctx context.Context, id string, s engine.Streams) error {
	return t.engine.Attach(ctx, id, s)
}

func (t targets) NetNS(sandboxID string) (string, error) { return t.cri.NetNS(sandboxID) }

func newNetwork(cfg *config.Config, log *slog.Logger) (podnet.Network, error) {
	switch cfg.NetworkPlugin {
	case "kubenet":
		return podnet.NewKubenet(podnet.KubenetConfig{
			BinDirs: cfg.CNIBinDirs, CacheDir: cfg.CNICacheDir, PodCIDRs: cfg.CIDRs(), MTU: cfg.MTU, Hairpin: cfg.HairpinMode, Log: log,
		})
	case "":
		return podnet.NewNoop(log), nil
	}
	n, err := podnet.NewCNI(podnet.CNIConfig{ConfDir: cfg.CNIConfDir, BinDirs: cfg.CNIBinDirs, CacheDir: cfg.CNICacheDir, Log: log})
	if err != nil {
		return nil, err
	}
	return n, n.SetPodCIDR(cfg.CIDRs())
}

// recoverAfterSync clears what a crash left, each time the view has been read anew.
func recoverAfterSync(ctx context.Context, p *parts, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.view.Synced():
		}
		rctx, cancel := context.WithTimeout(ctx, recoverDeadline)
		if err := p.cri.Recover(rctx); err != nil && ctx.Err() == nil {
			log.Error("recovery of what a crash left; it is tried again at the next start", "err", err)
		}
		cancel()
	}
}

// watchdog feeds systemd's watchdog, if the unit has one.
func watchdog(ctx context.Context) error {
	interval, err := sd.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return nil //nolint:nilerr // a broken WATCHDOG_USEC means that there is none
	}
	t := time.NewTicker(interval / 2)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			_, _ = sd.SdNotify(false, sd.SdNotifyWatchdog)
		}
	}
}

// ended makes the ordinary end of a part no error.
func ended(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// lock keeps a second daemon from the same node: two of them would take each other's pods apart.
func lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("--cri-dockerd-root-directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--cri-dockerd-root-directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another cri-dockerd runs with --cri-dockerd-root-directory %s; stop it first, two of them would take each other's pods apart", dir)
	}
	return func() { f.Close() }, nil
}
