package spec

import (
	"cmp"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// ImageVolume is an image that is mounted into a container (CRI Mount.image). The container's
// record has it.
type ImageVolume struct {
	ImageID model.ImageID `json:"image"`
	Target  string        `json:"target"`            // clean absolute path in the container
	SubPath string        `json:"subPath,omitempty"` // local path in the image
	// Path is where we have mounted it, with the sub-path; "" where the engine mounts images
	// itself.
	Path string `json:"-"`
	// Ref is the image's name with digest, "" for an image without one and in records of older
	// releases.
	Ref string `json:"ref,omitempty"`
}

// NewImageVolume is the volume of a mount that names image.
func NewImageVolume(m *runtimeapi.Mount, image *Image) ImageVolume {
	return ImageVolume{
		ImageID: image.ID,
		Target:  path.Clean(m.GetContainerPath()),
		SubPath: m.GetImageSubPath(),
		Ref:     image.digested(cmp.Or(m.GetImage().GetUserSpecifiedImage(), m.GetImage().GetImage())),
	}
}

// NativeImageVolumes says whether the engine mounts images itself (API 1.48, Engine 28, with
// containerd's image store).
func (h Host) NativeImageVolumes() bool { return h.ContainerdStore && h.AtLeast("1.48") }

// CheckImageVolumes says whether images can be mounted at all: by the engine, or by us from the
// directories of its graph driver overlay2. FailedPrecondition if not.
func (h Host) CheckImageVolumes() error {
	switch {
	case h.NativeImageVolumes():
		return nil
	case h.Has("rootless"), h.Has("userns"):
		return fmt.Errorf("image volumes need Engine 28 with containerd's image store where the engine maps user "+
			"IDs (rootless, userns-remap): %w", errdefs.ErrFailedPrecondition)
	case h.ContainerdStore:
		return fmt.Errorf("image volumes with containerd's image store came with Docker Engine 28; this is %s: %w",
			h.EngineVersion, errdefs.ErrFailedPrecondition)
	case h.StorageDriver != "overlay2":
		return fmt.Errorf("image volumes need the storage driver overlay2 or containerd's image store of Engine 28; "+
			"this engine has %s: %w", h.StorageDriver, errdefs.ErrFailedPrecondition)
	}

	return nil
}

// MountsImage says whether the container mounts this image.
func (c *Container) MountsImage(imageID model.ImageID) bool {
	return slices.ContainsFunc(c.ImageVolumes, func(v ImageVolume) bool { return v.ImageID == imageID })
}

// imageMount is an image volume in Docker's terms.
func imageMount(v ImageVolume) mount.Mount {
	if v.Path == "" {
		return mount.Mount{
			Type:         mount.TypeImage,
			Source:       string(v.ImageID),
			Target:       v.Target,
			ReadOnly:     true,
			ImageOptions: &mount.ImageOptions{Subpath: v.SubPath},
		}
	}

	return mount.Mount{
		Type:        mount.TypeBind,
		Source:      v.Path,
		Target:      v.Target,
		ReadOnly:    true,
		BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
	}
}

// imageVolumes are the images that a container mounts, in the order of its mounts.
func imageVolumes(cfg *runtimeapi.ContainerConfig, o ContainerOptions) []ImageVolume {
	var out []ImageVolume
	for i := range cfg.GetMounts() {
		if v, ok := o.ImageVolumes[i]; ok {
			out = append(out, v)
		}
	}
	return out
}

// check reports what is wrong with a volume that was read from a record.
func (v ImageVolume) check() error {
	if _, err := model.ParseImageID(string(v.ImageID)); err != nil {
		return err
	}

	if !path.IsAbs(v.Target) {
		return fmt.Errorf("target %q is not absolute", v.Target)
	}
	if v.SubPath != "" && !filepath.IsLocal(v.SubPath) {
		return fmt.Errorf("sub-path %q is not local", v.SubPath)
	}

	return nil
}

func (v ImageVolume) mount() *runtimeapi.Mount {
	return &runtimeapi.Mount{
		ContainerPath: v.Target,
		Readonly:      true,
		Image: &runtimeapi.ImageSpec{
			Image:    string(v.ImageID),
			ImageRef: cmp.Or(v.Ref, string(v.ImageID)), // as ContainerStatus has it
		},
		ImageSubPath: v.SubPath,
	}
}

// imageMount checks a mount of an image.
func (p *problems) imageMount(field string, m *runtimeapi.Mount) {
	if m.GetHostPath() != "" {
		p.add(field+".host_path", "must be empty beside an image")
	}
	if !m.GetReadonly() { // the kubelet sets it for every image volume
		p.add(field+".readonly", "must be true: an image cannot be mounted writable")
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

// HolderPrefix begins the names of holders; the image's ID without its algorithm follows. The
// engine can filter a list by it.
const HolderPrefix = "cri-dockerd_image-volume_"

// HolderName is the name of the holder of an image.
func HolderName(imageID model.ImageID) string { return HolderPrefix + imageID.Hex() }

// HeldImage returns the image that the container of this name holds, false if it is no holder. The
// name alone decides: an image may bring any label.
func HeldImage(name string) (model.ImageID, bool) {
	hex, ok := strings.CutPrefix(strings.TrimPrefix(name, "/"), HolderPrefix)
	if !ok {
		return "", false
	}
	id, err := model.ParseImageID("sha256:" + hex)
	return id, err == nil
}

// NewHolder is a container that is never started and keeps the layers of an image from being
// removed while we have them mounted.
func NewHolder(imageID model.ImageID) *Create {
	return &Create{
		Name: HolderName(imageID),
		Config: &container.Config{
			Image:       string(imageID),
			Cmd:         []string{"never-started"},
			Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
		},
		Host: &container.HostConfig{
			LogConfig:   container.LogConfig{Type: "none"},
			NetworkMode: "none",
		},
	}
}
