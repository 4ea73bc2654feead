package translate

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// propagation returns a mount propagation in Docker's terms.
func propagation(p runtimeapi.MountPropagation) mount.Propagation {
	switch p {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return mount.PropagationRSlave
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return mount.PropagationRShared
	}
	return mount.PropagationRPrivate
}

// readPropagation is the inverse of propagation.
func readPropagation(p mount.Propagation) runtimeapi.MountPropagation {
	switch p {
	case mount.PropagationRSlave, mount.PropagationSlave:
		return runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	case mount.PropagationRShared, mount.PropagationShared:
		return runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	}
	return runtimeapi.MountPropagation_PROPAGATION_PRIVATE
}

// setMounts adds bind mounts and mounts of images. Engines from 25 on would mount submounts
// read-only too, so every read-only mount sets its recursion.
func setMounts(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	for i, m := range cfg.GetMounts() {
		if m.GetImage().GetImage() != "" {
			v, ok := o.ImageVolumes[i]
			if !ok {
				return fmt.Errorf("config.mounts[%d].image: %s is not mounted: %w", i, m.GetImage().GetImage(),
					errdefs.ErrFailedPrecondition)
			}
			c.Host.Mounts = append(c.Host.Mounts, imageMount(v))
			continue
		}

		hostPath, containerPath := path.Clean(m.GetHostPath()), path.Clean(m.GetContainerPath())
		c.MakeDirs = append(c.MakeDirs, hostPath)
		if m.GetSelinuxRelabel() && o.Host.Has("selinux") {
			c.Host.Binds = append(c.Host.Binds, relabelledBind(m))
			continue
		}

		b := &mount.BindOptions{Propagation: propagation(m.GetPropagation())}
		if m.GetReadonly() && o.Host.RecursiveReadOnly() {
			b.ReadOnlyForceRecursive = m.GetRecursiveReadOnly() && !o.Sandbox.UsesShim() // see shimContainer
			b.ReadOnlyNonRecursive = !b.ReadOnlyForceRecursive
		}

		c.Host.Mounts = append(c.Host.Mounts, mount.Mount{
			Type:        mount.TypeBind,
			Source:      hostPath,
			Target:      containerPath,
			ReadOnly:    m.GetReadonly(),
			BindOptions: b,
		})
	}

	return nil
}

// relabelledBind returns a mount in the old string form. Docker relabels for SELinux only in this
// form.
func relabelledBind(m *runtimeapi.Mount) string {
	mode := "rw"
	if m.GetReadonly() {
		mode = "ro"
	}

	return strings.Join([]string{
		path.Clean(m.GetHostPath()), path.Clean(m.GetContainerPath()),
		mode + ",Z," + string(propagation(m.GetPropagation())),
	}, ":")
}
