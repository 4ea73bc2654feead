package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/process"
)

// statusInterval is the interval for updates of the status line without changes of the engine.
const statusInterval = 10 * time.Second

// notifySystemd notifies systemd until ctx ends: of readiness after started is closed, of changes
// of the status line, and of liveness twice per watchdog timeout. Each notification queries the
// other parts, so a part that hangs with a lock triggers the watchdog.
func (p *parts) notifySystemd(ctx context.Context, started <-chan struct{}) error {
	if !process.IsNotifying() {
		return nil
	}

	watchdog, err := process.WatchdogTimeout()
	if err != nil {
		return err
	}

	interval := statusInterval
	if watchdog > 0 {
		interval = min(interval, watchdog/2)
	}

	tick := time.NewTicker(interval)
	defer tick.Stop()

	warn := func(err error) {
		if err != nil {
			p.log.Warn("failed to notify systemd", "err", err)
		}
	}

	for line, ready := "", false; ; {
		changed := p.view.Changed()
		current, err := p.statusLine(ctx)
		if err != nil {
			return err
		}

		if current != line {
			line = current
			warn(process.NotifyStatus(line))
		}

		if ready {
			ready, started = false, nil
			warn(process.Notify(process.Ready))
		}

		if watchdog > 0 {
			warn(process.Notify(process.Alive))
		}

		select {
		case <-ctx.Done():
			return nil
		case <-started:
			ready = true
		case <-changed:
		case <-tick.C:
		}
	}
}

// statusLine returns the line for systemctl status, based on the CRI's Status.
func (p *parts) statusLine(ctx context.Context) (string, error) {
	s, err := p.service.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return "", fmt.Errorf("status line for systemd: %w", err)
	}
	return statusLine(s.GetStatus(), p.view.Engine().Host.EngineVersion), nil
}

func statusLine(s *runtimeapi.RuntimeStatus, engine string) string {
	var problems []string
	for _, c := range s.GetConditions() {
		if (c.GetType() == runtimeapi.RuntimeReady || c.GetType() == runtimeapi.NetworkReady) && !c.GetStatus() {
			problems = append(problems, c.GetMessage())
		}
	}

	line := "Ready, Docker " + engine
	if len(problems) > 0 {
		line = "Not ready: " + strings.Join(problems, "; ")
	}

	return strings.Join(strings.Fields(line), " ")
}
