package cri

import (
	"fmt"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/nri"
)

// Condition for NRI plugins. The kubelet ignores it; check and crictl info show it.
const nriPlugins = "NRIPlugins"

// pluginsCondition lists the plugins. It is false if none is connected, or if the runtime has
// disconnected one after a failure.
func pluginsCondition(s nri.State) *runtimeapi.RuntimeCondition {
	var connected, failed []string
	for _, p := range s.Plugins {
		if p.Connections > 0 {
			connected = append(connected, describePlugin(p))
		} else {
			failed = append(failed, describePlugin(p))
		}
	}

	c := &runtimeapi.RuntimeCondition{Type: nriPlugins, Message: strings.Join(append(failed, connected...), ", ")}
	switch {
	case !s.Started:
		c.Reason, c.Message = "Starting", "the daemon starts NRI after it has read all containers"
	case len(failed) > 0:
		c.Reason = "PluginFailed"
	case len(connected) == 0:
		c.Reason, c.Message = "NoPlugin", "NRI is on, and no plugin is connected"
	default:
		c.Status, c.Reason = true, "PluginsConnected"
	}

	return c
}

// describePlugin returns the name of a plugin with its failures.
func describePlugin(p nri.PluginState) string {
	out := p.Name
	switch {
	case p.Connections > 1:
		out += fmt.Sprintf(" (connected %d times)", p.Connections)
	case p.Connections <= 0:
		out += " (disconnected after a failure)"
	}

	if p.Failures > 0 {
		out += fmt.Sprintf(" (%d failed calls", p.Failures)
		if p.LastError != "" {
			out += "; the last: " + p.LastError
		}
		out += ")"
	}

	return out
}
