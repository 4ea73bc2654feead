package view

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
)

const (
	backoffMin   = 100 * time.Millisecond
	backoffMax   = 2 * time.Second
	resyncPeriod = 5 * time.Minute // to recover events dropped by the engine
	// HeartbeatInterval is the time between two pings. It detects a hanging engine within 20 s.
	HeartbeatInterval = 5 * time.Second
	heartbeatTimeout  = 10 * time.Second
	// hostTimeout bounds the first request of a connection.
	hostTimeout = 30 * time.Second
)

var errStreamEnded = errors.New("the engine ended its event stream")

// Run keeps the view up to date until ctx ends: it connects, reads everything, follows the events,
// and starts over when the engine disconnects. All watches end when it returns.
func (v *View) Run(ctx context.Context) error {
	defer v.endAll()

	for wait := backoffMin; ; wait = min(max(2*wait, backoffMin), backoffMax) {
		err := v.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}

		if errors.Is(err, errEventsMissed) {
			// The engine is up, so calls are answered while the stream begins again.
			wait = 0
			continue
		}

		if v.Engine().Ready {
			wait = backoffMin
			v.log.Warn("lost connection to Docker", "err", err)
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

// follow holds one connection. It returns the reason for its end.
func (v *View) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	host, err := v.host(ctx)
	if err != nil {
		return err
	}

	if last := v.Engine(); last.Ready { // only events were missed, so the last trial counts
		host.Shim = last.Host.Shim
	}

	v.setConnected(host)

	done := v.src.Events(ctx, v.observe)
	if err := v.readAll(ctx, resyncConnect); err != nil {
		return err
	}

	v.log.Info("connected to Docker", "version", host.EngineVersion, "api", host.APIVersion)
	v.setReady(host)

	// The first goroutine to end cancels the others. The view is then down until it has
	// reconnected.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return v.resync(ctx, done) })
	g.Go(func() error { return v.heartbeat(ctx) })
	g.Go(func() error { return v.checkEvents(ctx) })
	g.Go(func() error { return v.readPendingImages(ctx) })
	g.Go(func() error { return v.readPendingRefs(ctx) })
	if host.Shim.IsPending {
		g.Go(func() error { return v.tryShim(ctx, host.Shim) })
	}
	for range workers {
		g.Go(func() error { return v.readPending(ctx, g) })
	}

	return g.Wait()
}

// host connects, within hostTimeout.
func (v *View) host(ctx context.Context) (model.Host, error) {
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

// resync reads everything periodically and after lost events, until the event stream ends.
func (v *View) resync(ctx context.Context, done <-chan error) error {
	tick := time.NewTicker(resyncPeriod)
	defer tick.Stop()

	for {
		reason := resyncPeriodic
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-done:
			if err == nil {
				err = errStreamEnded
			}
			return err

		case <-tick.C:
		case <-v.missed:
			reason = resyncMissed
		}

		if err := v.readAll(ctx, reason); err != nil {
			return err
		}
	}
}
