package translate

import (
	"testing"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shim/annotation"
)

// TestOutputFollowsThePod verifies that a container gets the directory for the output of execs from
// its pod: the shim of an older pod rejects fields that it does not know.
func TestOutputFollowsThePod(t *testing.T) {
	const dir = "/run/cri-dockerd/exec"
	for name, pod := range map[string]string{"this version": dir, "older version": ""} {
		t.Run(name, func(t *testing.T) {
			h := model.Host{Shim: model.Shim{Mode: "auto", OutputDirectory: dir}}
			c, err := NewContainer(
				&runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "main"}},
				&runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"}},
				ContainerOptions{
					Host:    h,
					Sandbox: &model.Sandbox{ID: "aa", Runtime: annotation.Runtime, ExecOutput: pod},
					Image:   &model.Image{ID: "sha256:cafe"},
				})
			if err != nil {
				t.Fatal(err)
			}

			read := readAnnotation(&container.HostConfig{
				Runtime:     annotation.Runtime,
				Annotations: c.Host.Annotations,
			})
			if read.Output != pod {
				t.Errorf("the container has the directory %q, want %q", read.Output, pod)
			}
		})
	}
}
