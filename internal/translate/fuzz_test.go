package translate

import (
	"encoding/json"
	"maps"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/validate"
)

// FuzzTranslate checks that every valid request is translated without a panic, and that the result
// can be read back.
func FuzzTranslate(f *testing.F) {
	r := &runtimeapi.CreateContainerRequest{
		PodSandboxId: "beef",
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: "web:1"},
			Mounts:   []*runtimeapi.Mount{{HostPath: "/a", ContainerPath: "/b"}},
		},
		SandboxConfig: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{
			Name:      "a",
			Namespace: "b",
			Uid:       "c",
		}},
	}

	b, err := proto.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}

	f.Add(b, true)
	f.Add(b[:len(b)/2], false)
	f.Fuzz(func(t *testing.T, b []byte, isOld bool) {
		host := hosts["29"]
		if isOld {
			host = hosts["20.10"]
		}

		r := &runtimeapi.CreateContainerRequest{}
		if proto.Unmarshal(b, r) != nil {
			return
		}

		if validate.Request(&runtimeapi.RunPodSandboxRequest{Config: r.SandboxConfig}) == nil {
			translateSandbox(t, r.SandboxConfig, host)
		}
		if validate.Request(r) == nil {
			translateContainer(t, r, host)
		}
	})
}

// translateSandbox translates the configuration of a sandbox and reads the result.
func translateSandbox(t *testing.T, cfg *runtimeapi.PodSandboxConfig, host model.Host) {
	t.Helper()
	c, err := NewSandbox(cfg, SandboxOptions{
		Host:        host,
		Image:       model.PauseImage{Source: "p", Name: "p"},
		NetworkMode: model.NetworkBridge,
	})
	if errdefs.IsInvalidArgument(err) { // an oversized record
		return
	} else if err != nil {
		t.Fatal(err)
	}

	o := readCreated(t, c)
	if o.Sandbox == nil || !proto.Equal(o.Sandbox.Metadata, cfg.Metadata) {
		t.Fatalf("%s is read as %+v", c.Name, o.Sandbox)
	}
}

// translateContainer translates a request for a container and reads the result.
func translateContainer(t *testing.T, r *runtimeapi.CreateContainerRequest, host model.Host) {
	t.Helper()
	sb := &model.Sandbox{ID: testSandbox, Metadata: r.SandboxConfig.Metadata}
	image := &model.Image{ID: "i", Entrypoint: true}
	if validate.Container(r.Config, sb, image, host) != nil {
		return
	}

	c, err := NewContainer(r.Config, r.SandboxConfig, ContainerOptions{Host: host, Sandbox: sb, Image: image})
	if errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) { // an image volume is not mounted
		return
	} else if err != nil {
		t.Fatal(err)
	}

	if _, err := json.Marshal(c); err != nil {
		t.Fatal(err)
	}

	o := readCreated(t, c)
	if o.Container == nil || !maps.Equal(o.Container.Labels, r.Config.GetLabels()) {
		t.Fatalf("%s is read as %+v", c.Name, o.Container)
	}
}

// readCreated reads a container created by a request.
func readCreated(t *testing.T, c *Create) model.Object {
	t.Helper()
	return read(t, container.InspectResponse{
		ID:         testID,
		Name:       "/" + c.Name,
		Config:     c.Config,
		HostConfig: c.Host,
	})
}
