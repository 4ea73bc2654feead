package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recoverTimeout limits one recovery. It may release the networks of many pods, and each plugin has
// a timeout of one minute.
const recoverTimeout = time.Hour

// recoveryTimer measures a running recovery.
type recoveryTimer struct {
	start atomic.Int64 // nanoseconds of Unix time, 0 if no recovery is running
}

func (t *recoveryTimer) begin() { t.start.Store(time.Now().UnixNano()) }
func (t *recoveryTimer) end()   { t.start.Store(0) }

// check returns an error if a recovery has been running for longer than timeout.
func (t *recoveryTimer) check(timeout time.Duration) error {
	if start := t.start.Load(); start != 0 {
		if d := time.Since(time.Unix(0, start)); d > timeout {
			return fmt.Errorf("recovery has been running for %s", d.Round(time.Second))
		}
	}
	return nil
}

// alive returns the checks of /healthz.
func (p *parts) alive() []check {
	return []check{
		{"view", func(context.Context) error { return p.view.CheckProgress() }},
		{"network", func(context.Context) error { _, _ = p.network.State(); return nil }}, // acquires its lock
		{"recovery", func(context.Context) error { return p.recovery.check(recoverTimeout) }},
	}
}

// ready returns the checks of /readyz: the conditions required by the kubelet for a ready node,
// with the same messages.
func (p *parts) ready() []check {
	return []check{
		{"engine", func(ctx context.Context) error { return p.condition(ctx, runtimeapi.RuntimeReady) }},
		{"network", func(ctx context.Context) error { return p.condition(ctx, runtimeapi.NetworkReady) }},
	}
}

// condition returns an error unless a condition of the CRI's Status is true.
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

	return fmt.Errorf("condition %s is missing from the CRI status", name)
}
