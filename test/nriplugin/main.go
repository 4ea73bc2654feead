// nriplugin is an NRI plugin for tests. It sets the environment variable PLUGIN of each new
// container to its configuration, and adds an OCI hook to containers whose pod has the annotation
// "hook".
package main

import (
	"context"
	"flag"
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

// CreateContainer sets the variable and adds the hook.
func (p *plugin) CreateContainer(
	_ context.Context, pod *api.PodSandbox, _ *api.Container,
) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a := &api.ContainerAdjustment{}
	a.AddEnv("PLUGIN", p.config)
	if path := pod.GetAnnotations()["hook"]; path != "" {
		a.AddHooks(&api.Hooks{Poststart: []*api.Hook{{Path: path}}})
	}

	return a, nil, nil
}

func main() {
	index := flag.String("idx", "", "index of the plugin; by default from the runtime")
	flag.Parse()

	var options []stub.Option
	if *index != "" {
		options = append(options, stub.WithPluginIdx(*index))
	}

	s, err := stub.New(&plugin{}, options...)
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
