package spec

import (
	"fmt"
	"path"
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

// containerMounts makes bind mounts, and mounts of images. A read-only mount is not recursively so
// unless asked: engines from 25 on would otherwise do it.
func containerMounts(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	for i, m := range cfg.GetMounts() {
		field := fmt.Sprintf("config.mounts[%d]", i)
		if err := checkMount(field, m, o.Host); err != nil {
			return err
		}

		if m.GetImage().GetImage() != "" {
			v, ok := o.ImageVolumes[i]
			if !ok {
				return fmt.Errorf("%s.image: %s is not mounted: %w", field, m.GetImage().GetImage(),
					errdefs.ErrFailedPrecondition)
			}
			c.Host.Mounts = append(c.Host.Mounts, imageMount(v))
			continue
		}

		hostPath, containerPath := path.Clean(m.GetHostPath()), path.Clean(m.GetContainerPath())
		c.MakeDirs = append(c.MakeDirs, hostPath)
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
			Type:        mount.TypeBind,
			Source:      hostPath,
			Target:      containerPath,
			ReadOnly:    m.GetReadonly(),
			BindOptions: b,
		})
	}

	return nil
}

// checkMount refuses what this engine or this release cannot do.
func checkMount(field string, m *runtimeapi.Mount, h Host) error {
	switch {
	case len(m.GetUidMappings())+len(m.GetGidMappings()) > 0:
		return fmt.Errorf("%s.uidMappings: ID-mapped mounts are not supported on this runtime: %w", field,
			errdefs.ErrInvalidArgument)
	case len(m.GetMountOptions()) > 0:
		return fmt.Errorf("%s.mount_options: Docker cannot set %s on a bind mount: %w", field,
			strings.Join(m.GetMountOptions(), ","), errdefs.ErrInvalidArgument)
	case m.GetRecursiveReadOnly() && !h.RecursiveReadOnly():
		return fmt.Errorf("%s.recursive_read_only: Docker Engine %s cannot; it came with Engine 25: %w", field,
			h.EngineVersion, errdefs.ErrInvalidArgument)
	}

	return nil
}

// relabelledBind is a mount in the old string form, the only one in which Docker relabels for
// SELinux.
func relabelledBind(field string, m *runtimeapi.Mount) (string, error) {
	hostPath, containerPath := path.Clean(m.GetHostPath()), path.Clean(m.GetContainerPath())
	if strings.Contains(hostPath+containerPath, ":") {
		return "", fmt.Errorf("%s: Docker cannot relabel a path with a colon: %w", field, errdefs.ErrInvalidArgument)
	}

	if m.GetRecursiveReadOnly() {
		return "", fmt.Errorf("%s.recursive_read_only: Docker cannot combine it with selinux_relabel: %w", field,
			errdefs.ErrInvalidArgument)
	}

	mode := "rw"
	if m.GetReadonly() {
		mode = "ro"
	}

	return strings.Join([]string{hostPath, containerPath, mode + ",Z," + string(propagation(m.GetPropagation()))}, ":"),
		nil
}

// mount checks a mount.
func (p *problems) mount(field string, m *runtimeapi.Mount) {
	p.mountPath(field+".container_path", m.GetContainerPath())
	if path.Clean(m.GetContainerPath()) == "/" {
		p.add(field+".container_path", "%q is the container's root", m.GetContainerPath())
	}

	if m.GetImage().GetImage() != "" {
		p.imageMount(field, m)
	} else {
		p.mountPath(field+".host_path", m.GetHostPath())
		if m.GetImageSubPath() != "" {
			p.add(field+".image_sub_path", "needs an image")
		}
	}

	enum(p, field+".propagation", runtimeapi.MountPropagation_name, m.GetPropagation())
	if m.GetRecursiveReadOnly() &&
		(!m.GetReadonly() || m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE) {
		p.add(field+".recursive_read_only", "needs readonly and private propagation")
	}
}

// mountPath wants an absolute path. Unlike those of other paths, the parts ".." of a mount's paths
// are cleaned away: the API server accepts them.
func (p *problems) mountPath(field, s string) {
	p.required(field, s)
	if s != "" && !path.IsAbs(s) {
		p.add(field, "%q must be an absolute path", s)
	}
}
