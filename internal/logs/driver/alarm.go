package driver

import (
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
)

// Causes of a shortage. Each is a label of the metric
// cri_dockerd_log_alarms and a sentence in Status.Alarms.
const (
	alarmPipes       = "pipes"       // root's pipe pages are used up
	alarmDescriptors = "descriptors" // this process, or the node, has no file descriptor left
	alarmTable       = "table"       // a file of the table could not be read
)

// alarmText gives the problem and the remedy, by cause.
var alarmText = map[string]string{
	alarmPipes: "the kernel's pipe pages for root are used up, so containers that print long lines are slowed down; " +
		"raise fs.pipe-user-pages-soft, or give the log-driver process CAP_SYS_RESOURCE",
	alarmDescriptors: "the log-driver process has no file descriptor left, so new containers cannot be logged; " +
		"raise LimitNOFILE of cri-docker-log.service, or fs.file-max",
	alarmTable: "a file of the log-driver's table was damaged and is set aside; see the log of cri-docker-log.service",
}

// alarms are the shortages that last. It is safe for concurrent use.
type alarms struct {
	log     *slog.Logger
	gauge   *prometheus.GaugeVec
	changed notifier // after each change

	mu     sync.Mutex     // guards raised
	raised map[string]int // by cause: how many raise it
}

func newAlarms(log *slog.Logger, gauge *prometheus.GaugeVec) *alarms {
	for cause := range alarmText {
		gauge.WithLabelValues(cause).Set(0)
	}

	return &alarms{
		log:    log,
		gauge:  gauge,
		raised: map[string]int{},
	}
}

// add changes how many raise an alarm. It logs the first one and the end of the last.
func (a *alarms) add(cause string, n int) {
	if n == 0 { // as for each batch
		return
	}
	a.update(cause, func(old int) int { return max(0, old+n) })
}

// raise raises an alarm that has no number.
func (a *alarms) raise(cause string) { a.update(cause, func(int) int { return 1 }) }

// lower ends an alarm.
func (a *alarms) lower(cause string) { a.update(cause, func(int) int { return 0 }) }

func (a *alarms) update(cause string, next func(int) int) {
	a.mu.Lock()
	before := a.raised[cause]
	after := next(before)
	a.raised[cause] = after
	a.mu.Unlock()
	if (before > 0) == (after > 0) {
		return
	}

	a.gauge.WithLabelValues(cause).Set(float64(min(after, 1)))
	if after > 0 {
		a.log.Error("container logs", "alarm", cause, "err", alarmText[cause])
	} else {
		a.log.Info("container logs: the alarm is over", "alarm", cause)
	}

	a.changed.notify()
}

// list returns the sentences of all raised alarms, in the order of their causes.
func (a *alarms) list() []string {
	a.mu.Lock()
	defer a.mu.Unlock()

	var out []string
	for _, cause := range slices.Sorted(maps.Keys(a.raised)) {
		if a.raised[cause] > 0 {
			out = append(out, alarmText[cause])
		}
	}

	return out
}

// isShortage reports whether file descriptors are used up.
func isShortage(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}
