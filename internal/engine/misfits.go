package engine

import (
	"context"

	"cri-dockerd/internal/translate"
)

// Misfit is a container with the name or labels of a pod's container that no runtime manages.
type Misfit struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// Misfits lists the misfits, running or not.
func (e *Engine) Misfits(ctx context.Context) ([]Misfit, error) {
	list, err := e.list(ctx, nil)
	if err != nil {
		return nil, wrap(err, "list containers")
	}

	var out []Misfit
	for _, item := range list {
		name := item.name()
		if reason := translate.Misfit("/"+name, item.Labels); reason != "" {
			out = append(out, Misfit{item.ID, name, reason})
		}
	}

	return out, nil
}
