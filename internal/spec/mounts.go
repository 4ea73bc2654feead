package spec

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// propagations are CRI's mount propagations in Docker's terms.
func propagation(p runtimeapi.MountPropagation) mount.Propagation {
	switch p {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return mount.PropagationRSlave
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return mount.PropagationRShared
	}
	return mount.PropagationRPrivate
}

func readPropagation(p mount.Propagation) runtimeapi.MountPropagation {
	switch p {
	case mount.PropagationRSlave, mount.PropagationSlave:
		return runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	case mount.PropagationRShared, mount.PropagationShared:
		return runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	}
	return runtimeapi.MountPropagation_PROPAGATION_PRIVATE
}

// containerMounts makes bind mounts, and mounts of images. A read-only mount is not recursively so unless asked: engines from 25 on would otherwise do it.
func containerMounts(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	for i, m := range cfg.GetMounts() {
		field := fmt.Sprintf("config.mounts[%d]", i)
		if err := checkMount(field, m, o.Host); err != nil {
			return err
		}
		if m.GetImage().GetImage() != "" {
			v, ok := o.ImageVolumes[i]
			if !ok {
				return fmt.Errorf("%s.image: %s is not mounted: %w", field, m.GetImage().GetImage(), errdefs.ErrFailedPrecondition)
			}
			c.Host.Mounts = append(c.Host.Mounts, imageMount(v))
			continue
		}
		c.MakeDirs = append(c.MakeDirs, m.GetHostPath())
		if m.GetSelinuxRelabel() && o.Host.Has("selinux") {
			bind, err := relabelledBind(field, m)
			if err != nil {
				return err
			}
			c.Host.Binds = append(c.Host.Binds, bind)
			continue
		}
		b := &mount.BindOptions{Propagation: propagation(m.GetPropagation())}
		if m.GetReadonly() && o.Host.RecursiveReadOnly() {
			b.ReadOnlyForceRecursive = m.GetRecursiveReadOnly()
			b.ReadOnlyNonRecursive = !m.GetRecursiveReadOnly()
		}
		c.Host.Mounts = append(c.Host.Mounts, mount.Mount{
			Type: mount.TypeBind, Source: m.GetHostPath(), Target: m.GetContainerPath(), ReadOnly: m.GetReadonly(), BindOptions: b,
		})
	}
	return nil
}

// checkMount refuses what this engine or this release cannot do.
func checkMount(field string, m *runtimeapi.Mount, h Host) error {
	switch {
	case len(m.GetUidMappings())+len(m.GetGidMappings()) > 0:
		return fmt.Errorf("%s.uidMappings: ID-mapped mounts are not supported on this runtime: %w", field, errdefs.ErrInvalidArgument)
	case len(m.GetMountOptions()) > 0:
		return fmt.Errorf("%s.mount_options: Docker cannot set %s on a bind mount: %w", field, strings.Join(m.GetMountOptions(), ","), errdefs.ErrInvalidArgument)
	case m.GetRecursiveReadOnly() && !h.RecursiveReadOnly():
		return fmt.Errorf("%s.recursive_read_only: Docker Engine %s cannot; it came with Engine 25: %w", field, h.EngineVersion, errdefs.ErrInvalidArgument)
	}
	return nil
}

// relabelledBind is a mount in the old string form, the only one in which Docker relabels for SELinux.
func relabelledBind(field string, m *runtimeapi.Mount) (string, error) {
	if strings.Contains(m.GetHostPath()+m.GetContainerPath(), ":") {
		return "", fmt.Errorf("%s: Docker cannot relabel a path with a colon: %w", field, errdefs.ErrInvalidArgument)
	}
	if m.GetRecursiveReadOnly() {
		return "", fmt.Errorf("%s.recursive_read_only: Docker cannot combine it with selinux_relabel: %w", field, errdefs.ErrInvalidArgument)
	}
	mode := "rw"
	if m.GetReadonly() {
		mode = "ro"
	}
	return strings.Join([]string{m.GetHostPath(), m.GetContainerPath(), mode + ",Z," + string(propagation(m.GetPropagation()))}, ":"), nil
}
