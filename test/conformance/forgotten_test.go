package conformance

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestForgottenStart kills dockerd after containerd has started a container and before dockerd has
// recorded the start. dockerd then takes the running container for created. The daemon kills the
// processes of this container and no others.
func TestForgottenStart(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		kept := n.start(t, pod, cfg, sh("sleep 1000"))
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Metadata.Name, cc.LogPath = "forgotten", "forgotten_0.log"
		forgotten := n.startConfig(t, pod, cfg, cc)
		process := "/proc/" + n.inspect(t, forgotten, ".State.Pid")
		n.run(t, "test", "-e", process)

		n.own(t).Kill(t)
		n.forgetStart(t, forgotten)
		n.own(t).Restart(t)

		eventually(t, "the daemon to kill the forgotten container", func() bool {
			return n.own(t).Command("test", "-e", process).Run() != nil
		})
		if s := n.containerStatus(t, forgotten).State; s != runtimeapi.ContainerState_CONTAINER_CREATED {
			t.Errorf("the forgotten container is %s, want created", s)
		}

		n.exec(t, kept, "true")
	})
}

// forgetStart resets the state of a container in the files of a stopped dockerd to never started.
func (n *node) forgetStart(t *testing.T, id string) {
	t.Helper()
	file := filepath.Join(n.own(t).DataRoot(), "containers", id, "config.v2.json")
	b, err := os.ReadFile(file)
	var config map[string]any
	if err == nil {
		err = json.Unmarshal(b, &config)
	}

	if err != nil {
		t.Fatal(err)
	}

	config["State"] = map[string]any{
		"StartedAt":  "0001-01-01T00:00:00Z",
		"FinishedAt": "0001-01-01T00:00:00Z",
	}

	b, err = json.Marshal(config)
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}

	if err != nil {
		t.Fatal(err)
	}
}
