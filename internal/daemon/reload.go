package daemon

import (
	"context"
	"os"
	"time"

	"cri-dockerd/internal/process"
)

// reloadTimeout limits one reload. systemd waits 90 s for it.
const reloadTimeout = 30 * time.Second

// reloadLoop reloads on every signal until ctx ends. Pods and running calls are not affected.
func (p *parts) reloadLoop(ctx context.Context, signals <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			p.reload(ctx)
		}
	}
}

// reload reads the network configuration and the state of the engine again. Flags do not change
// during the lifetime of the process.
func (p *parts) reload(ctx context.Context) {
	begin := time.Now()
	if err := process.NotifyReloading(); err != nil {
		p.log.Warn("failed to notify systemd", "err", err)
	}

	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()

	p.network.Reload(ctx)
	engine := "ok"
	if e := p.view.Engine(); !e.Ready {
		engine = e.Reason // the next connection reads everything
	} else if err := p.view.Resync(ctx); err != nil {
		engine = err.Error()
	}

	network := "ok"
	if _, err := p.network.State(); err != nil {
		network = err.Error()
	}

	p.log.Info("reloaded", "engine", engine, "network", network, "took", time.Since(begin).Round(time.Microsecond))
	if err := process.Notify(process.Ready); err != nil {
		p.log.Warn("failed to notify systemd", "err", err)
	}
}
