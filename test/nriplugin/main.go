// nriplugin is an NRI plugin for tests of --nri-plugin-dir. It sets the environment variable PLUGIN
// of each new container to its configuration.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct{ config string }

// Configure takes the configuration, and subscribes to all events with a handler.
func (p *plugin) Configure(_ context.Context, config, _, _ string) (stub.EventMask, error) {
	p.config = strings.TrimSpace(config)
	return 0, nil
}

// CreateContainer sets the variable.
func (p *plugin) CreateContainer(
	context.Context, *api.PodSandbox, *api.Container,
) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a := &api.ContainerAdjustment{}
	a.AddEnv("PLUGIN", p.config)
	return a, nil, nil
}

func main() {
	s, err := stub.New(&plugin{})
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
