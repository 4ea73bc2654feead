package nri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/adaptation/builtin"
	"github.com/containerd/nri/pkg/api"

	"cri-dockerd/internal/text"
)

// NRI's library knows which plugin has made an adjustment. It gives this only to validators, so a
// builtin validator records it. It rejects nothing.

const (
	recorderBase  = "cri-dockerd"
	recorderIndex = "00"
	recorderName  = recorderIndex + "-" + recorderBase
)

// recorder returns the builtin validator.
func recorder() *builtin.BuiltinPlugin {
	return &builtin.BuiltinPlugin{
		Base:     recorderBase,
		Index:    recorderIndex,
		Handlers: builtin.BuiltinHandlers{ValidateContainerAdjustment: recordOwners},
	}
}

type ownersKey struct{}

// owners are the plugins of a new container's adjustments.
type owners struct {
	mu     sync.Mutex // guards fields
	fields *api.FieldOwners
}

// withOwners returns a ctx whose CreateContainer records owners.
func withOwners(ctx context.Context) (context.Context, *owners) {
	o := &owners{}
	return context.WithValue(ctx, ownersKey{}, o), o
}

func recordOwners(ctx context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	o, ok := ctx.Value(ownersKey{}).(*owners)
	if !ok {
		return nil
	}

	o.mu.Lock()
	defer o.mu.Unlock()
	o.fields = r.GetOwners().GetOwners()[r.GetContainer().GetId()]

	return nil
}

// of returns the names of the plugins that have adjusted any of these fields. It is empty if they
// are unknown.
func (o *owners) of(fields ...api.Field) []string {
	if o == nil {
		return nil
	}

	o.mu.Lock()
	defer o.mu.Unlock()

	var out []string
	add := func(owner string) {
		owner, _ = api.IsMarkedForRemoval(owner)
		for name := range strings.SplitSeq(owner, ",") { // several plugins may add hooks
			if name = text.Clean(name, text.MaxName); name != "" && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	for _, f := range fields {
		add(o.fields.GetSimple()[f.Key()])
		for _, owner := range o.fields.GetCompound()[f.Key()].GetOwners() {
			add(owner)
		}
	}
	slices.Sort(out)

	return out
}

// describe returns the name of an adjustment with its plugins.
func (o *owners) describe(name string, fields ...api.Field) string {
	if plugins := o.of(fields...); len(plugins) > 0 {
		return fmt.Sprintf("%s (by plugin %s)", name, strings.Join(plugins, ", "))
	}
	return name
}
