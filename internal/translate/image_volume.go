package translate

import (
	"cmp"
	"fmt"
	"path"
	"path/filepath"

	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// NewImageVolume returns the volume for a mount of image.
func NewImageVolume(m *runtimeapi.Mount, image *model.Image) model.ImageVolume {
	return model.ImageVolume{
		ImageID: image.ID,
		Target:  path.Clean(m.GetContainerPath()),
		SubPath: m.GetImageSubPath(),
		Ref:     image.DigestedName(cmp.Or(m.GetImage().GetUserSpecifiedImage(), m.GetImage().GetImage())),
	}
}

// imageMount returns an image volume in Docker's terms.
func imageMount(v model.ImageVolume) mount.Mount {
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

// imageVolumes returns the image volumes of a container in the order of its mounts.
func imageVolumes(cfg *runtimeapi.ContainerConfig, o ContainerOptions) []model.ImageVolume {
	var out []model.ImageVolume
	for i := range cfg.GetMounts() {
		if v, ok := o.ImageVolumes[i]; ok {
			out = append(out, v)
		}
	}
	return out
}

// checkImageVolume checks a volume from a record on disk.
func checkImageVolume(v model.ImageVolume) error {
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

// readImageVolume returns the mount of an image volume for ContainerStatus.
func readImageVolume(v model.ImageVolume) *runtimeapi.Mount {
	return &runtimeapi.Mount{
		ContainerPath: v.Target,
		Readonly:      true,
		Image: &runtimeapi.ImageSpec{
			Image:    string(v.ImageID),
			ImageRef: cmp.Or(v.Ref, string(v.ImageID)), // as in ContainerStatus.image_ref
		},
		ImageSubPath: v.SubPath,
	}
}
