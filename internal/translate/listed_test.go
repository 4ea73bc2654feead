package translate

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func TestReadListed(t *testing.T) {
	r := &record{
		Name:      "k8s_main_web_default_u_3",
		Labels:    map[string]string{"app": "web"},
		Container: &containerRecord{SandboxID: testSandbox, Image: "web:1", LogPath: "/var/log/pods/x"},
	}

	labels, err := r.write(map[string]string{labelType: typeContainer})
	if err != nil {
		t.Fatal(err)
	}

	listed := Listed{
		ID:          testID,
		Name:        r.Name,
		ImageID:     testImage,
		Created:     1700000000,
		NetworkMode: "container:" + testSandbox,
		Labels:      labels,
	}

	for state, want := range map[string]struct {
		status string
		state  runtimeapi.ContainerState
		code   int32
	}{
		"created": {"Created", runtimeapi.ContainerState_CONTAINER_CREATED, 0},
		"running": {"Up 2 hours", runtimeapi.ContainerState_CONTAINER_RUNNING, 0},
		"paused":  {"Up 2 hours (Paused)", runtimeapi.ContainerState_CONTAINER_RUNNING, 0},
		"exited":  {"Exited (137) 2 hours ago", runtimeapi.ContainerState_CONTAINER_EXITED, 137},
		"dead":    {"Dead", runtimeapi.ContainerState_CONTAINER_EXITED, 255},
	} {
		t.Run(state, func(t *testing.T) {
			listed.State, listed.Status = state, want.status
			o := ReadListed(listed, model.ImageLabels{})
			c := o.Container
			if o.Unread != testID || c == nil || !c.Stale {
				t.Fatalf("object %+v", o)
			}

			if c.State != want.state || c.ExitCode != want.code || c.Labels["app"] != "web" ||
				c.SandboxID != testSandbox || c.CreatedAt.Unix() != listed.Created {
				t.Errorf("container %+v", c)
			}

			if c.State == runtimeapi.ContainerState_CONTAINER_EXITED && (c.Reason == "" || c.FinishedAt.IsZero()) {
				t.Errorf("reason %q, finished %s", c.Reason, c.FinishedAt)
			}
		})
	}

	listed.Labels = map[string]string{labelRecord: "{", labelType: typeContainer}
	if o := ReadListed(listed, model.ImageLabels{}); o.Unread != testID || o.Container != nil {
		t.Errorf("invalid record: %+v", o)
	}
}
