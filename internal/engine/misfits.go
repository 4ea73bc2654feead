package engine

import (
	"context"
	"strings"

	"github.com/moby/moby/client"

	"cri-dockerd/internal/spec"
)

// Misfit is a container that looks like one of a pod's and that nobody manages.
type Misfit struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// Misfits lists such containers, running or not.
func (e *Engine) Misfits(ctx context.Context) ([]Misfit, error) {
	list, err := e.docker().ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, wrap(err, "list containers")
	}
	var out []Misfit
	for _, item := range list.Items {
		name := ""
		for _, n := range item.Names {
			if strings.Count(n, "/") == 1 { // the others are of links
				name = n
			}
		}
		if reason := spec.Misfit(name, item.Labels); reason != "" {
			out = append(out, Misfit{item.ID, strings.TrimPrefix(name, "/"), reason})
		}
	}
	return out, nil
}
