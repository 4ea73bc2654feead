package daemon

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// States that systemd is told, sd_notify(3).
const (
	ready    = sd.SdNotifyReady
	stopping = sd.SdNotifyStopping
	alive    = sd.SdNotifyWatchdog
	status   = "STATUS="
)

// statusPeriod is how often the status line is made anew where nothing else asks for it.
const statusPeriod = 10 * time.Second

// notify tells systemd a state; without NOTIFY_SOCKET nobody wants to know.
func notify(state string) error {
	if _, err := sd.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell systemd %s: %w", state, err)
	}
	return nil
}

// tellSystemd tells until ctx ends what systemd wants to know: that the daemon is ready, once begun is closed; its state in words; and that it
// lives, twice as often as WatchdogSec asks. It asks the other parts each time, so that one that is stuck with a lock lets the watchdog bite.
func (p *parts) tellSystemd(ctx context.Context, begun <-chan struct{}) error {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil
	}
	guarded, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("systemd's WATCHDOG_USEC: %w", err)
	}
	every := statusPeriod
	if guarded > 0 {
		every = min(every, guarded/2)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	say := func(state string) {
		if err := notify(state); err != nil {
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
			say(status + line)
		}
		if begin {
			begin, begun = false, nil
			say(ready)
		}
		if guarded > 0 {
			say(alive)
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

// statusLine is what systemctl status shows: the CRI's Status in one line.
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
