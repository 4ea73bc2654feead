package validate

import (
	"fmt"
	"path"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/internal/text"
)

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

	for i, o := range m.GetMountOptions() {
		if !annotation.IsMountOption(o) {
			p.add(fmt.Sprintf("%s.mount_options[%d]", field, i), "%q must be nodev, noexec or nosuid",
				text.Clean(o, maxName))
		}
	}
}

// mountPath requires an absolute path. The API server accepts ".." in paths of mounts, so the
// translation cleans them.
func (p *problems) mountPath(field, s string) {
	p.required(field, s)
	if s != "" && !path.IsAbs(s) {
		p.add(field, "%q must be an absolute path", s)
	}
}

// imageMount checks a mount of an image.
func (p *problems) imageMount(field string, m *runtimeapi.Mount) {
	if m.GetHostPath() != "" {
		p.add(field+".host_path", "must be empty for an image")
	}
	if !m.GetReadonly() { // the kubelet sets it for every image volume
		p.add(field+".readonly", "must be true: an image cannot be mounted writable")
	}
	if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		p.add(field+".propagation", "must be private for an image")
	}

	if s := m.GetImageSubPath(); s != "" {
		p.text(field+".image_sub_path", s)
		if path.IsAbs(s) || hasDotDot(s) {
			p.add(field+".image_sub_path", "%q must be inside the image", s)
		}
	}
}
