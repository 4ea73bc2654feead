// Package daemon creates the parts of the daemon and runs them. It locks the root directory,
// listens, notifies systemd, follows the engine, recovers after a crash, and stops the parts in
// order. Pods are not affected by its start or stop.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"cri-dockerd/internal/config"
	"cri-dockerd/internal/cri"
	"cri-dockerd/internal/process"
	"cri-dockerd/internal/view"
)

const (
	// startTimeout limits the time until the first read of the engine is complete. Until then,
	// calls and systemd units ordered after the daemon wait. A stopped engine causes no delay, but
	// a hanging engine must not delay the start forever. Engine 20.10 takes more than ten seconds
	// for GET /info during another client's pull with an unresolvable registry name.
	startTimeout = 30 * time.Second
	// stopGrace is the grace period for running calls when the daemon stops. systemd kills it after
	// 90 s.
	stopGrace = 10 * time.Second
	// recoverRetryMin is the delay after an incomplete recovery. It doubles up to recoverRetryMax.
	recoverRetryMin = time.Minute
	recoverRetryMax = 16 * time.Minute
	// gcPercent is the growth of the heap between collections. The largest responses, the metrics
	// of all pods, are rare.
	gcPercent = 50
	// umask overrides the umask of the unit. The daemon creates missing host paths of mounts with
	// mode 0755, readable for the users of containers.
	umask = 0o022
)

// Run serves the CRI until ctx ends (nil) or a part fails. The engine may be down at any time.
// Errors give the cause and the fix in one sentence. version is the version line of this program.
func Run(ctx context.Context, cfg *config.Config, version string, log *slog.Logger) error {
	for _, w := range cfg.Warnings() {
		log.Warn(w)
	}

	debug.SetGCPercent(gcPercent)
	syscall.Umask(umask)
	klog.SetSlogLogger(log.With("component", "streaming"))

	unlock, err := process.LockDirectory("--cri-dockerd-root-directory", cfg.RootDirectory, process.HandOverTimeout)
	if err != nil {
		return err
	}
	defer unlock()

	// Two daemons with different root directories but the same run directory would remove each
	// other's namespaces and mounts.
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
	defer func() {
		if err := p.close(); err != nil {
			log.Debug("close", "err", err)
		}
	}()

	return p.run(ctx, hup)
}

// run runs the parts until ctx ends or a part fails. A signal on hup triggers a reload.
func (p *parts) run(ctx context.Context, hup <-chan os.Signal) error {
	g, ctx := errgroup.WithContext(ctx)
	started := make(chan struct{})
	for _, part := range []func() error{
		func() error { return ignoreCanceled(p.view.Run(ctx)) },
		func() error { return ignoreCanceled(p.oom.Run(ctx)) },
		func() error { return ignoreCanceled(p.exits.Run(ctx)) },
		func() error { p.logs.Run(ctx); return nil },
		func() error { p.network.Run(ctx); return nil },
		func() error { p.engine.DiscardLeftovers(ctx); return nil },
		func() error { p.imageFS.Run(ctx); return nil },
		func() error { p.recoverLoop(ctx); return nil },
		func() error { p.service.CompleteStarts(ctx); return nil },
		func() error { return p.runPlugins(ctx) },
		func() error { p.units.Run(ctx); return nil },
		func() error { cri.LimitKeeper{Service: p.service}.Run(ctx); return nil },
		func() error { p.reloadLoop(ctx, hup); return nil },
		p.streams.Serve,
		func() error { p.begin(ctx, started); return nil },
		func() error { return p.serve(ctx) },
		func() error { return p.notifySystemd(ctx, started) },
		func() error { return p.endpoint.serve(ctx, p.metricsListener) },
		func() error { return p.stop(ctx) },
	} {
		g.Go(part)
	}

	return g.Wait()
}

// begin closes p.known and then started when the daemon can serve calls.
func (p *parts) begin(ctx context.Context, started chan<- struct{}) {
	p.awaitEngine(ctx, startTimeout, isKnown)
	close(p.known)
	p.awaitLogs(ctx, startTimeout)
	close(started)
}

// serve serves the CRI after the engine has responded or is known to be down. Until then, calls
// wait in the socket instead of failing.
func (p *parts) serve(ctx context.Context) error {
	p.awaitEngine(ctx, startTimeout, hasResponded)
	if err := process.DropProgramPages(); err != nil {
		p.log.Debug("failed to release memory of the program", "err", err)
	}
	p.log.Info("serving the CRI", "address", p.listener.Addr().String())
	return p.server.Serve(p.listener)
}

// stop stops the servers when ctx ends.
func (p *parts) stop(ctx context.Context) error {
	<-ctx.Done()
	p.log.Info("stopping; pods keep running")
	err := process.Notify(process.Stopping)
	p.server.Stop(stopGrace)
	return errors.Join(err, p.streams.Close())
}

// hold delays calls until p.known is closed. Version and RuntimeConfig only need a connection to
// the engine.
func (p *parts) hold(ctx context.Context, method string) error {
	if method == "Version" || method == "RuntimeConfig" {
		return nil
	}

	select {
	case <-p.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// isKnown reports whether the first read of the engine is complete or has failed.
func isKnown(e view.EngineState) bool { return e.Attempted }

// hasResponded reports whether the engine has responded or is down.
func hasResponded(e view.EngineState) bool { return e.Connected || e.Attempted }

// awaitEngine waits until the engine has reached a state, at most for timeout.
func (p *parts) awaitEngine(ctx context.Context, timeout time.Duration, reached func(view.EngineState) bool) {
	p.await(ctx, timeout, nil, func() bool { return reached(p.view.Engine()) })
}

// awaitLogs waits until the log mode is decided, at most for timeout. Until then, the node is not
// ready, and units ordered after the daemon should not start yet. It does not wait while the engine
// is down.
func (p *parts) awaitLogs(ctx context.Context, timeout time.Duration) {
	p.await(ctx, timeout, p.logs.Decided(), func() bool { return !p.view.Engine().Ready })
}

// await waits until done is closed or isDone returns true, at most for timeout. It calls isDone
// after each change of the engine.
func (p *parts) await(ctx context.Context, timeout time.Duration, done <-chan struct{}, isDone func() bool) {
	expired := time.NewTimer(timeout)
	defer expired.Stop()

	for {
		changed := p.view.Changed()
		if isDone() {
			return
		}

		select {
		case <-ctx.Done():
			return
		case <-expired.C:
			return
		case <-done:
			return
		case <-changed:
		}
	}
}

// recoverLoop removes leftovers of a crash after each full read of the view, and retries after
// errors.
func (p *parts) recoverLoop(ctx context.Context) {
	retry := time.NewTimer(recoverRetryMin)
	retry.Stop()
	defer retry.Stop()

	delay := recoverRetryMin
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.view.Synced():
			p.logs.EngineConnected()
			delay = recoverRetryMin
		case <-retry.C:
		case <-p.network.Leftovers():
			delay = recoverRetryMin
		}

		p.recovery.begin()
		err := p.service.Recover(ctx)
		p.recovery.end()
		if ctx.Err() != nil {
			return
		}

		p.recoveries.WithLabelValues(result(err)).Inc()
		if err != nil {
			p.log.Warn("failed to remove all leftovers; retrying", "retry", delay, "err", err)
			retry.Reset(delay)
			delay = min(2*delay, recoverRetryMax)
		}
	}
}

// result returns the value of the label result.
func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
