package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageVolume is an image that is mounted into a container (CRI Mount.image). It is remembered in a label of the container.
type ImageVolume struct {
	ImageID string `json:"image"`
	Target  string `json:"target"`
	SubPath string `json:"subPath,omitempty"`
	// Path is where we have mounted it, with the sub-path; "" where the engine mounts images itself.
	Path string `json:"-"`
}

// NativeImageVolumes says whether the engine mounts images itself (API 1.48, Engine 28, with containerd's image store).
func (h Host) NativeImageVolumes() bool { return h.ContainerdStore && h.AtLeast("1.48") }

// CheckImageVolumes says whether images can be mounted at all: by the engine, or by us from the directories of its graph driver overlay2.
// FailedPrecondition if not.
func (h Host) CheckImageVolumes() error {
	switch {
	case h.NativeImageVolumes():
		return nil
	case h.Has("rootless"), h.Has("userns"):
		return fmt.Errorf("image volumes need Engine 28 with containerd's image store where the engine maps user IDs (rootless, userns-remap): %w", errdefs.ErrFailedPrecondition)
	case h.ContainerdStore:
		return fmt.Errorf("image volumes with containerd's image store came with Docker Engine 28; this is %s: %w", h.EngineVersion, errdefs.ErrFailedPrecondition)
	case h.StorageDriver != "overlay2":
		return fmt.Errorf("image volumes need the storage driver overlay2 or containerd's image store of Engine 28; this engine has %s: %w", h.StorageDriver, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// MountsImage says whether the container mounts this image.
func (c *Container) MountsImage(imageID string) bool {
	return slices.ContainsFunc(c.ImageVolumes, func(v ImageVolume) bool { return v.ImageID == imageID })
}

// imageMount is an image volume in Docker's terms.
func imageMount(v ImageVolume) mount.Mount {
	if v.Path == "" {
		return mount.Mount{Type: mount.TypeImage, Source: v.ImageID, Target: v.Target, ReadOnly: true, ImageOptions: &mount.ImageOptions{Subpath: v.SubPath}}
	}
	return mount.Mount{Type: mount.TypeBind, Source: v.Path, Target: v.Target, ReadOnly: true, BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate}}
}

// readImageVolumes are a container's image volumes as its label has them.
func readImageVolumes(in container.InspectResponse) []ImageVolume {
	return fromJSON[[]ImageVolume](in.Config.Labels[labelImageVolumes])
}

func (v ImageVolume) mount() *runtimeapi.Mount {
	return &runtimeapi.Mount{ContainerPath: v.Target, Readonly: true, Image: &runtimeapi.ImageSpec{Image: v.ImageID}, ImageSubPath: v.SubPath}
}

// imageMount checks a mount of an image.
func (p *problems) imageMount(field string, m *runtimeapi.Mount) {
	if m.GetHostPath() != "" {
		p.add(field+".host_path", "must be empty beside an image")
	}
	if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		p.add(field+".propagation", "an image is mounted privately")
	}
	if s := m.GetImageSubPath(); s != "" {
		p.text(field+".image_sub_path", s)
		if path.IsAbs(s) || strings.Contains("/"+s+"/", "/../") {
			p.add(field+".image_sub_path", "%q must lie inside the image", s)
		}
	}
}

// NewHolder is a container that is never started and keeps the layers of an image from being removed while we have them mounted.
func NewHolder(imageID string) *Create {
	return &Create{
		Name: holderPrefix + strings.TrimPrefix(imageID, "sha256:"),
		Config: &container.Config{
			Image: imageID, Cmd: []string{"never-started"}, Labels: map[string]string{LabelHolder: imageID}, Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
		},
		Host: &container.HostConfig{LogConfig: container.LogConfig{Type: "none"}, NetworkMode: "none"},
	}
}

const holderPrefix = "cri-dockerd_image-volume_"
