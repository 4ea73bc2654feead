package daemon

import (
	"context"
	"errors"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// alive are the checks of /healthz.
func (p *parts) alive() []check {
	return []check{
		{"view", func(context.Context) error { p.view.Engine(); return nil }}, // its lock can be had
	}
}

// ready are the checks of /readyz: the conditions on which the kubelet calls the node ready, in the same words.
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
