package model

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/text"
)

// Limits in bytes.
const (
	maxAttributes = 16 << 10 // of an item's attributes in stats; larger ones are shortened
	maxEssential  = 8 << 10  // of the labels of a shortened item, and of its annotations
)

// kubeletPrefix is the prefix of labels and annotations with the kubelet's own metadata. The
// kubelet identifies objects in lists and stats by them.
const kubeletPrefix = "io.kubernetes."

// essential returns the labels or annotations of a list item that a kubelet needs. The status of
// the object has all of them.
func essential(all map[string]string) map[string]string {
	keys := make([]string, 0, len(all))
	for k, v := range all {
		if strings.HasPrefix(k, kubeletPrefix) && len(k)+len(v) <= text.MaxName {
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

// ShortItem returns Item with essential labels and annotations only, for an overlong list.
func (s *Sandbox) ShortItem() *runtimeapi.PodSandbox {
	item := s.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

// ShortItem returns Item with essential labels and annotations only, for an overlong list.
func (c *Container) ShortItem() *runtimeapi.Container {
	item := c.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

// Attributes returns the sandbox's attributes for PodSandboxStats, shortened if they are large.
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

// Attributes returns the container's attributes for ContainerStats, shortened if they are large.
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
