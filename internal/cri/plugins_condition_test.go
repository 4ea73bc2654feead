package cri

import (
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/nri"
)

func TestPluginsCondition(t *testing.T) {
	connected := nri.PluginState{Name: "10-logger", Connections: 1}
	failing := nri.PluginState{Name: "20-x", Connections: 2, Failures: 3, LastError: "StartContainer: no"}
	recovered := nri.PluginState{Name: "20-x", Connections: 1, Failures: 3}
	dropped := nri.PluginState{Name: "30-y", Failures: 1, LastError: "CreateContainer: timeout"}

	for name, test := range map[string]struct {
		state           nri.State
		status          bool
		reason, message string
	}{
		"before the start": {nri.State{}, false, "Starting", "the daemon starts NRI after it has read all containers"},
		"no plugin":        {nri.State{Started: true}, false, "NoPlugin", "NRI is on, and no plugin is connected"},
		"connected": {
			nri.State{Started: true, Plugins: []nri.PluginState{connected, recovered}},
			true, "PluginsConnected", "10-logger, 20-x (3 failed calls)",
		},
		"failing": {
			nri.State{Started: true, Plugins: []nri.PluginState{failing}},
			true, "PluginsConnected", "20-x (connected 2 times) (3 failed calls; the last: StartContainer: no)",
		},
		"dropped": {
			nri.State{Started: true, Plugins: []nri.PluginState{connected, dropped}},
			false, "PluginFailed",
			"30-y (disconnected after a failure) (1 failed calls; the last: CreateContainer: timeout), 10-logger",
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := &runtimeapi.RuntimeCondition{
				Type:    "NRIPlugins",
				Status:  test.status,
				Reason:  test.reason,
				Message: test.message,
			}
			if got := pluginsCondition(test.state); !proto.Equal(got, want) {
				t.Errorf("condition %v, want %v", got, want)
			}
		})
	}
}
