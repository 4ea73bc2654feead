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

// Causes of a shortage. Each is a label value of the metric cri_dockerd_log_alarms and a sentence
// in Status.Alarms.
const (
	alarmPipes       = "pipes"       // root's pipe pages are exhausted
	alarmDescriptors = "descriptors" // this process, or the node, has run out of file descriptors
	alarmTable       = "table"       // a file of the table is unreadable
)

// alarmText describes the problem and the remedy of each cause.
var alarmText = map[string]string{
	alarmPipes: "the kernel's pipe pages for root are exhausted, which slows down containers with long lines; " +
		"raise fs.pipe-user-pages-soft, or give the log-driver process CAP_SYS_RESOURCE",
	alarmDescriptors: "the log-driver process has run out of file descriptors and cannot log new containers; " +
		"raise LimitNOFILE of cri-docker-log.service, or fs.file-max",
	alarmTable: "a damaged file of the log-driver's table was set aside; see the log of cri-docker-log.service",
}

// alarms tracks ongoing shortages. It is safe for concurrent use.
type alarms struct {
	log     *slog.Logger
	gauge   *prometheus.GaugeVec
	changed notifier // after each change

	mu     sync.Mutex     // guards raised
	raised map[string]int // number of shortages by cause
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

// add changes the number of shortages of a cause. It logs the first one and the end of the last
// one.
func (a *alarms) add(cause string, n int) {
	if n == 0 { // the usual case
		return
	}
	a.update(cause, func(old int) int { return max(0, old+n) })
}

// raise raises an alarm without a count.
func (a *alarms) raise(cause string) { a.update(cause, func(int) int { return 1 }) }

// lower clears an alarm.
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
		a.log.Error("container logs: alarm raised", "alarm", cause, "err", alarmText[cause])
	} else {
		a.log.Info("container logs: alarm cleared", "alarm", cause)
	}

	a.changed.notify()
}

// list returns the sentences of all raised alarms, sorted by cause.
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

// isShortage reports whether an error is caused by a lack of file descriptors.
func isShortage(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}
