package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recoverLimit is for one recovery: networks of many pods may have to be released, and each plugin
// has a minute.
const recoverLimit = time.Hour

// busy is since when something is being done, in nanoseconds of Unix time; 0: nothing is.
type busy struct{ since atomic.Int64 }

func (b *busy) begin() { b.since.Store(time.Now().UnixNano()) }
func (b *busy) end()   { b.since.Store(0) }

// stuck is nil unless it is being done for longer than limit.
func (b *busy) stuck(limit time.Duration) error {
	if since := b.since.Load(); since != 0 {
		if d := time.Since(time.Unix(0, since)); d > limit {
			return fmt.Errorf("it goes on for %s already", d.Round(time.Second))
		}
	}
	return nil
}

// alive are the checks of /healthz.
func (p *parts) alive() []check {
	return []check{
		{"view", func(context.Context) error { return p.view.CheckProgress() }},
		{"network", func(context.Context) error { _, _ = p.network.State(); return nil }}, // its lock can be had
		{"recovery", func(context.Context) error { return p.recovering.stuck(recoverLimit) }},
	}
}

// ready are the checks of /readyz: the conditions on which the kubelet calls the node ready, in the
// same words.
func (p *parts) ready() []check {
	return []check{
		{"engine", func(ctx context.Context) error { return p.condition(ctx, runtimeapi.RuntimeReady) }},
		{"network", func(ctx context.Context) error { return p.condition(ctx, runtimeapi.NetworkReady) }},
	}
}

// condition is nil if a condition of the CRI's Status holds.
func (p *parts) condition(ctx context.Context, name string) error {
	s, err := p.service.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}

	for _, c := range s.GetStatus().GetConditions() {
		if c.GetType() == name && c.GetStatus() {
			return nil
		} else if c.GetType() == name {
			return errors.New(c.GetMessage())
		}
	}

	return errors.New("it is not told")
}
