package daemon

import (
	"context"
	"os"
	"time"

	"cri-dockerd/internal/process"
)

// reloadDeadline is for one reload; systemd waits 90 s for it.
const reloadDeadline = 30 * time.Second

// reloadLoop reloads on every signal until ctx ends. Pods and calls under way are not touched.
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

// reload reads anew what may have changed behind the daemon's back: the network's configuration,
// and all that the engine has. Flags hold for the life of the process.
func (p *parts) reload(ctx context.Context) {
	begin := time.Now()
	if err := process.NotifyReloading(); err != nil {
		p.log.Warn("systemd does not listen", "err", err)
	}

	ctx, cancel := context.WithTimeout(ctx, reloadDeadline)
	defer cancel()

	p.network.Reload(ctx)
	said := "ok"
	if e := p.view.Engine(); !e.Ready {
		said = e.Reason // everything is read when it comes
	} else if err := p.view.Resync(ctx); err != nil {
		said = err.Error()
	}

	network := "ok"
	if _, err := p.network.State(); err != nil {
		network = err.Error()
	}

	p.log.Info("reloaded", "engine", said, "network", network, "took", time.Since(begin).Round(time.Microsecond))
	if err := process.Notify(process.Ready); err != nil {
		p.log.Warn("systemd does not listen", "err", err)
	}
}
