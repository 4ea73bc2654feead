package daemon

import (
	"context"
	"fmt"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
)

// States that systemd is told, sd_notify(3).
const (
	ready    = sd.SdNotifyReady
	stopping = sd.SdNotifyStopping
	alive    = sd.SdNotifyWatchdog
)

// notify tells systemd a state; without NOTIFY_SOCKET nobody wants to know.
func notify(state string) error {
	if _, err := sd.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell systemd %s: %w", state, err)
	}
	return nil
}

// watchdog tells systemd that we live, twice as often as WatchdogSec asks, until ctx ends. Without one it returns at once.
func watchdog(ctx context.Context) error {
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("systemd's WATCHDOG_USEC: %w", err)
	}
	if every <= 0 {
		return nil
	}
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := notify(alive); err != nil {
				return err
			}
		}
	}
}
