package cri

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// mounting requests a container with an image volume.
func mounting(pod string, cfg *runtimeapi.PodSandboxConfig, name, subPath string) *runtimeapi.CreateContainerRequest {
	r := createRequest(pod, cfg)
	r.Config.Metadata.Name = name
	r.Config.Mounts = []*runtimeapi.Mount{{
		ContainerPath: "/volume",
		Readonly:      true,
		Image:         &runtimeapi.ImageSpec{Image: testImage},
		ImageSubPath:  subPath,
	}}

	return r
}

// TestImageVolumesAreShared: containers of two pods share a mount. It is removed with the last one,
// and until then its image cannot be removed.
func TestImageVolumesAreShared(t *testing.T) {
	s, w := newService(t)
	var pods, containers []string
	for i := range 2 {
		cfg := w.pod()
		pods = append(pods, runPod(t, s, cfg))
		r, err := s.CreateContainer(t.Context(), mounting(pods[i], cfg, "user", "sub/path"))
		if err != nil {
			t.Fatal(err)
		}
		containers = append(containers, r.ContainerId)
	}

	mounted := keys(w, w.mounted)
	if len(mounted) != 1 {
		t.Fatalf("mounted: %v", mounted)
	}

	status, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: containers[0]})
	if err != nil || len(status.Status.Mounts) != 1 || status.Status.Mounts[0].Image.GetImage() != mounted[0] ||
		status.Status.Mounts[0].ImageSubPath != "sub/path" || status.Status.Mounts[0].HostPath != "" {
		t.Errorf("ContainerStatus: %v, %v", status, err)
	}

	if _, err := s.RemoveImage(t.Context(),
		&runtimeapi.RemoveImageRequest{
			Image: &runtimeapi.ImageSpec{Image: testImage},
		}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("RemoveImage: %v", err)
	}

	if _, err := s.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{
		ContainerId: containers[0],
	}); err != nil || len(keys(w, w.mounted)) != 1 {
		t.Errorf("RemoveContainer of the first: %v, mounted %v", err, keys(w, w.mounted))
	}

	for _, p := range pods {
		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p}); err != nil {
			t.Error(err)
		}
	}

	w.assertNoLeftovers(t, s)
}

// TestImageVolumeFailsAtEachStep breaks each step of a create. No mount and no holder may remain.
func TestImageVolumeFailsAtEachStep(t *testing.T) {
	s, w := newService(t)
	for n := 1; ; n++ {
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		name := w.breakNth(n)
		_, err := s.CreateContainer(t.Context(), mounting(pod, cfg, "user", ""))
		step := name()
		if step != "" && !errors.Is(err, errBroken) {
			t.Errorf("%s failed: %v", step, err)
		}

		if held, _ := w.engine.HeldImages(t.Context()); step != "" && len(keys(w, w.mounted))+len(held) > 0 {
			t.Errorf("%s failed: mounted %v, held %v", step, keys(w, w.mounted), held)
		}

		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: pod,
		}); err != nil {
			t.Error(err)
		}

		w.assertNoLeftovers(t, s)
		if step == "" {
			if n < 6 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}

func TestImageVolumeRefused(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	tests := []struct {
		change func(*runtimeapi.Mount)
		kind   func(error) bool
		field  string
	}{
		{func(m *runtimeapi.Mount) { m.ImageSubPath = "missing" }, errdefs.IsNotFound, "config.mounts[0].image"},
		{func(m *runtimeapi.Mount) { m.Image.Image = "nobody:1" }, errdefs.IsNotFound, "config.mounts[0].image"},
	}

	for _, test := range tests {
		t.Run(test.field, func(t *testing.T) {
			r := mounting(pod, cfg, "user", "")
			test.change(r.Config.Mounts[0])
			if _, err := s.CreateContainer(t.Context(), r); !test.kind(err) ||
				!strings.Contains(fmt.Sprint(err), test.field) {
				t.Errorf("mount %v: %v", r.Config.Mounts[0], err)
			}

			if held, _ := w.engine.HeldImages(t.Context()); len(keys(w, w.mounted))+len(held) > 0 {
				t.Errorf("%v: mounted %v, held %v", r.Config.Mounts[0], keys(w, w.mounted), held)
			}
		})
	}
}

// TestImageVolumesAfterACrash: unused mounts and holders are removed, and a pruned holder in use is
// created again.
func TestImageVolumesAfterACrash(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	if _, err := s.CreateContainer(t.Context(), mounting(pod, cfg, "user", "")); err != nil {
		t.Fatal(err)
	}

	used := keys(w, w.mounted)[0]
	if err := w.engine.ReleaseImage(t.Context(), model.ImageID(used)); err != nil {
		t.Fatal(err)
	}

	w.set(w.mounted, "sha256:"+strings.Repeat("0", 64), true)
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	held, err := w.engine.HeldImages(t.Context())
	if mounted := keys(w, w.mounted); err != nil || len(mounted) != 1 || mounted[0] != used || len(held) != 1 ||
		string(held[0]) != used {
		t.Errorf("mounted %v, held %v, %v", mounted, held, err)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}

	// as if a reboot had removed the mount
	if _, err := w.engine.HoldImage(t.Context(), model.ImageID(used)); err != nil {
		t.Fatal(err)
	}

	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	w.assertNoLeftovers(t, s)
}
