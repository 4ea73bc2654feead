package probe

import (
	"context"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/proc"
)

// hungTimeout is the time without a response after which a service counts as hung. GET /info of
// Engine 20.10 takes more than ten seconds during a pull with an unresolvable registry name.
const hungTimeout = 20 * time.Second

// limit returns the timeout of the probes of services: a slow service is not a hung one.
func (p *Prober) limit() time.Duration { return max(hungTimeout, 2*p.timeout) }

// stopwatch measures the calls of a probe to a service.
type stopwatch struct {
	timeout     time.Duration
	slowest     time.Duration      // of all calls
	findStopped func() (pid int)   // 0 if no process of the service is stopped
	end         context.CancelFunc // releases the context
}

// measure returns a context for calls to a service, and their stopwatch. If a call takes longer
// than the timeout of the probe and a process of the service is stopped, the context ends: it never
// responds. The caller must call end.
func (p *Prober) measure(ctx context.Context, processes func() []proc.Process) (context.Context, *stopwatch) {
	ctx, cancel := context.WithCancel(ctx)
	w := &stopwatch{timeout: p.timeout}
	w.findStopped = func() int {
		for _, x := range processes() {
			if p.proc.IsStopped(x) {
				return x.PID
			}
		}
		return 0
	}

	late := time.AfterFunc(p.timeout, func() {
		if w.findStopped() != 0 {
			cancel()
		}
	})
	w.end = func() { late.Stop(); cancel() }

	return ctx, w
}

// call measures one call.
func (w *stopwatch) call(do func()) {
	begin := time.Now()
	do()
	w.slowest = max(w.slowest, time.Since(begin))
}

// stopped returns the ID of a stopped process of a service with this problem, or 0.
func (w *stopwatch) stopped(problem finding.Problem) int {
	if problem != finding.Silent {
		return 0
	}
	return w.findStopped()
}

// slow returns the time of the slowest call if it exceeds the timeout, otherwise 0.
func (w *stopwatch) slow() time.Duration {
	if w.slowest <= w.timeout {
		return 0
	}
	return w.slowest
}
