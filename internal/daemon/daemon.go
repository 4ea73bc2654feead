// Package daemon wires the parts and runs them: it takes the lock on the root directory, listens,
// notifies systemd, follows the engine, recovers after a crash, and stops in order. Pods do not
// notice its start or stop.
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
	"cri-dockerd/internal/process"
	"cri-dockerd/internal/view"
)

const (
	// startTimeout is how long the first read of the engine may hold up calls, and the start of
	// units that systemd orders after the daemon. An engine that is down does not hold them up at
	// all, one that neither answers nor refuses must not do so for ever. Engine 20.10 takes more
	// than ten seconds for GET /info while another client's pull waits for a name that DNS does not
	// resolve.
	startTimeout = 30 * time.Second
	// stopGrace is for calls that run when the daemon stops. systemd kills after 90 s.
	stopGrace = 10 * time.Second
	// recoverRetryMin is the pause after a recovery that could not clear everything. It doubles up
	// to recoverRetryMax.
	recoverRetryMin = time.Minute
	recoverRetryMax = 16 * time.Minute
	// gcPercent is how much the heap grows between collections. Responses with the metrics of all
	// pods are the largest by far, and rare.
	gcPercent = 50
	// umask is the daemon's own, whatever its unit's is: missing host paths of mounts are 0755, so
	// that the users of containers can read them.
	umask = 0o022
)

// Run serves the CRI until ctx ends (nil) or something fails at start or later. The engine may be
// down at any time. Errors give the cause and the fix in one sentence. version is this program's.
func Run(ctx context.Context, cfg *config.Config, version string, log *slog.Logger) error {
	for _, w := range cfg.Warnings() {
		log.Warn(w)
	}

	debug.SetGCPercent(gcPercent)
	syscall.Umask(umask)
	klog.SetSlogLogger(log.With("from", "streaming"))

	unlock, err := process.LockDirectory("--cri-dockerd-root-directory", cfg.RootDirectory, process.HandOverTimeout)
	if err != nil {
		return err
	}
	defer unlock()

	// Two daemons with root directories of their own would still take each other's namespaces and
	// mounts for leftovers.
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

// run runs the parts until ctx ends or one fails. A signal on hup reloads.
func (p *parts) run(ctx context.Context, hup <-chan os.Signal) error {
	g, ctx := errgroup.WithContext(ctx)
	begun := make(chan struct{})
	for _, part := range []func() error{
		func() error { return ignoreEnd(p.view.Run(ctx)) },
		func() error { return ignoreEnd(p.oom.Run(ctx)) },
		func() error { return ignoreEnd(p.exits.Run(ctx)) },
		func() error { p.logs.Run(ctx); return nil },
		func() error { p.network.Run(ctx); return nil },
		func() error { p.imageFS.Run(ctx); return nil },
		func() error { p.recoverLoop(ctx); return nil },
		func() error { p.service.CompleteStarts(ctx); return nil },
		func() error { p.reloadLoop(ctx, hup); return nil },
		p.streams.Serve,
		func() error { p.begin(ctx, begun); return nil },
		func() error { return p.serve(ctx) },
		func() error { return p.notifySystemd(ctx, begun) },
		func() error { return p.endpoint.serve(ctx, p.metricsListener) },
		func() error { return p.stop(ctx) },
	} {
		g.Go(part)
	}

	return g.Wait()
}

// begin closes p.known and then begun, as soon as the daemon can answer.
func (p *parts) begin(ctx context.Context, begun chan<- struct{}) {
	p.awaitEngine(ctx, startTimeout, isKnown)
	close(p.known)
	p.awaitLogs(ctx, startTimeout)
	close(begun)
}

// serve serves the CRI as soon as the engine has answered or is down. Until then calls wait in the
// socket: better than a response that nothing is known.
func (p *parts) serve(ctx context.Context) error {
	p.awaitEngine(ctx, startTimeout, isAnswering)
	if err := process.DropProgramPages(); err != nil {
		p.log.Debug("the program stays in memory as a whole", "err", err)
	}
	p.log.Info("serving the CRI", "at", p.listener.Addr().String())
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

// hold keeps calls back until it is known what runs, or that the engine is down. Version and
// RuntimeConfig are answered as soon as the engine is connected.
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

// isKnown reports whether it is known what runs, or that the engine is down.
func isKnown(e view.EngineState) bool { return e.Attempted }

// isAnswering reports whether the engine has answered, or is down.
func isAnswering(e view.EngineState) bool { return e.Connected || e.Attempted }

// awaitEngine waits until the engine is in a state, at most for timeout.
func (p *parts) awaitEngine(ctx context.Context, timeout time.Duration, reached func(view.EngineState) bool) {
	p.await(ctx, timeout, nil, func() bool { return reached(p.view.Engine()) })
}

// awaitLogs waits until it is known how containers are logged, at most for timeout: until then the
// node is not ready, which units that are ordered after the daemon need not see. It does not wait
// for an engine that is down.
func (p *parts) awaitLogs(ctx context.Context, timeout time.Duration) {
	p.await(ctx, timeout, p.logs.Decided(), func() bool { return !p.view.Engine().Ready })
}

// await waits until done is closed, or isDone after a change of the engine, at most for timeout.
func (p *parts) await(ctx context.Context, timeout time.Duration, done <-chan struct{}, isDone func() bool) {
	late := time.NewTimer(timeout)
	defer late.Stop()

	for {
		changed := p.view.Changed()
		if isDone() {
			return
		}

		select {
		case <-ctx.Done():
			return
		case <-late.C:
			return
		case <-done:
			return
		case <-changed:
		}
	}
}

// recoverLoop clears leftovers of a crash whenever the view has been read anew, and tries again
// later what could not be cleared.
func (p *parts) recoverLoop(ctx context.Context) {
	again := time.NewTimer(recoverRetryMin)
	again.Stop()
	defer again.Stop()

	pause := recoverRetryMin
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.view.Synced():
			p.logs.EngineConnected()
			pause = recoverRetryMin
		case <-again.C:
		case <-p.network.Leftovers():
			pause = recoverRetryMin
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
			pause = min(2*pause, recoverRetryMax)
		}
	}
}

// result is the label of a metric.
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
