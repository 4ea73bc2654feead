package spec

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/text"
)

// Bounds in bytes.
const (
	maxAttributes = 16 << 10 // of the attributes in an item of stats; larger ones are shortened
	maxEssential  = 8 << 10  // of the remaining labels of a shortened item, and of its annotations
)

// kubeletMark is the prefix of the labels and annotations by which a kubelet recognises its objects
// in lists and stats.
const kubeletMark = "io.kubernetes."

// essential returns the labels or annotations that a kubelet needs in a list. The status of the
// object has all of them.
func essential(all map[string]string) map[string]string {
	keys := make([]string, 0, len(all))
	for k, v := range all {
		if strings.HasPrefix(k, kubeletMark) && len(k)+len(v) <= text.MaxName {
			keys = append(keys, k)
		}
	}

	slices.Sort(keys)

	out, size := map[string]string{}, 0
	for _, k := range keys {
		if size += len(k) + len(all[k]); size > maxEssential {
			break
		}
		out[k] = all[k]
	}

	return out
}

// ShortItem is Item with the essential labels and annotations only, for a list that is too large.
func (s *Sandbox) ShortItem() *runtimeapi.PodSandbox {
	item := s.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

// ShortItem is Item with the essential labels and annotations only, for a list that is too large.
func (c *Container) ShortItem() *runtimeapi.Container {
	item := c.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

// Attributes name the sandbox in its stats (PodSandboxStats). They are shortened if they are large.
func (s *Sandbox) Attributes() *runtimeapi.PodSandboxAttributes {
	a := &runtimeapi.PodSandboxAttributes{
		Id:          string(s.ID),
		Metadata:    s.Metadata,
		Labels:      s.Labels,
		Annotations: s.Annotations,
	}
	if proto.Size(a) > maxAttributes {
		a.Labels, a.Annotations = essential(a.Labels), essential(a.Annotations)
	}

	return a
}

// Attributes name the container in its stats (ContainerStats). They are shortened if they are
// large.
func (c *Container) Attributes() *runtimeapi.ContainerAttributes {
	a := &runtimeapi.ContainerAttributes{
		Id:          string(c.ID),
		Metadata:    c.Metadata,
		Labels:      c.Labels,
		Annotations: c.Annotations,
	}
	if proto.Size(a) > maxAttributes {
		a.Labels, a.Annotations = essential(a.Labels), essential(a.Annotations)
	}

	return a
}
