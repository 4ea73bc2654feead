package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/process"
)

// statusInterval is how often the status line is checked where no change of the engine does so.
const statusInterval = 10 * time.Second

// notifySystemd reports to systemd until ctx ends: that the daemon is ready, once begun is closed;
// its state in words; and twice in systemd's watchdog timeout that it is alive. It asks the other
// parts each time, so that one that hangs with a lock triggers the watchdog.
func (p *parts) notifySystemd(ctx context.Context, begun <-chan struct{}) error {
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
			p.log.Warn("systemd does not listen", "err", err)
		}
	}

	for line, begin := "", false; ; {
		changed := p.view.Changed()
		now, err := p.statusLine(ctx)
		if err != nil {
			return err
		}

		if now != line {
			line = now
			warn(process.NotifyStatus(line))
		}

		if begin {
			begin, begun = false, nil
			warn(process.Notify(process.Ready))
		}

		if watchdog > 0 {
			warn(process.Notify(process.Alive))
		}

		select {
		case <-ctx.Done():
			return nil
		case <-begun:
			begin = true
		case <-changed:
		case <-tick.C:
		}
	}
}

// statusLine returns the line for systemctl status: the CRI's Status.
func (p *parts) statusLine(ctx context.Context) (string, error) {
	s, err := p.service.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return "", fmt.Errorf("systemd's status line: %w", err)
	}
	return statusLine(s.GetStatus(), p.view.Engine().Host.EngineVersion), nil
}

func statusLine(s *runtimeapi.RuntimeStatus, engine string) string {
	var wrong []string
	for _, c := range s.GetConditions() {
		if (c.GetType() == runtimeapi.RuntimeReady || c.GetType() == runtimeapi.NetworkReady) && !c.GetStatus() {
			wrong = append(wrong, c.GetMessage())
		}
	}

	line := "Ready, Docker " + engine
	if len(wrong) > 0 {
		line = "Not ready: " + strings.Join(wrong, "; ")
	}

	return strings.Join(strings.Fields(line), " ")
}
