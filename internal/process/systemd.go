package process

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Notification states for Notify (sd_notify(3)).
const (
	Ready    = daemon.SdNotifyReady
	Stopping = daemon.SdNotifyStopping
	Alive    = daemon.SdNotifyWatchdog
	status   = "STATUS="
)

// Notify sends systemd a state. It does nothing without NOTIFY_SOCKET.
func Notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify systemd of %s: %w", state, err)
	}
	return nil
}

// NotifyStatus sets the status line shown by systemctl status.
func NotifyStatus(line string) error { return Notify(status + line) }

// NotifyReloading begins a reload, and Notify(Ready) completes it. The monotonic time lets systemd
// distinguish this reload's reply from an earlier one's (sd_notify(3), Type=notify-reload).
func NotifyReloading() error {
	return Notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
}

// IsNotifying reports whether systemd expects notifications.
func IsNotifying() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// WatchdogTimeout returns the maximum interval between two Alive notifications. It is 0 without a
// watchdog.
func WatchdogTimeout() (time.Duration, error) {
	d, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0, fmt.Errorf("systemd's WATCHDOG_USEC: %w", err)
	}
	return d, nil
}

// EnvironWithoutSystemd returns this process's environment without systemd's variables. It is meant
// for a child that outlives this process.
func EnvironWithoutSystemd() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}, name) ||
			strings.HasPrefix(name, "LISTEN_")
	})
}
