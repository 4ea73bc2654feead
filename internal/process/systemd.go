package process

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// States for Notify, sd_notify(3).
const (
	Ready    = daemon.SdNotifyReady
	Stopping = daemon.SdNotifyStopping
	Alive    = daemon.SdNotifyWatchdog
	status   = "STATUS="
)

// Notify sends systemd a state. Without NOTIFY_SOCKET it does nothing.
func Notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify systemd of %s: %w", state, err)
	}
	return nil
}

// NotifyStatus sends systemd the line that systemctl status shows.
func NotifyStatus(line string) error { return Notify(status + line) }

// NotifyReloading begins a reload, which Notify(Ready) ends. The time lets systemd tell the answer
// to this reload from one to an earlier (sd_notify(3), Type=notify-reload).
func NotifyReloading() error {
	return Notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
}

// IsNotifying reports whether systemd waits for states.
func IsNotifying() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// WatchdogTimeout is how often systemd expects Alive at least; 0 if it does not.
func WatchdogTimeout() (time.Duration, error) {
	d, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0, fmt.Errorf("systemd's WATCHDOG_USEC: %w", err)
	}
	return d, nil
}

// EnvironWithoutSystemd returns this process's environment without systemd's messages to it, for a
// process that outlives it.
func EnvironWithoutSystemd() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}, name) ||
			strings.HasPrefix(name, "LISTEN_")
	})
}
