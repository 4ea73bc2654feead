package cri

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

// Bounds of answers in bytes. A kubelet takes 16 MiB; package rpc refuses what is larger.
const (
	maxList       = 15 << 20 // of a list; one that is larger has its largest items shortened
	maxAttributes = 16 << 10 // of the attributes in an item of stats; larger ones are shortened
	maxEssential  = 8 << 10  // of what is left of an item's labels, and of its annotations
	maxInfo       = 1 << 20  // of the info in a verbose answer
)

// kubeletMark is the prefix of the labels and annotations by which a kubelet recognises its objects in lists and stats.
const kubeletMark = "io.kubernetes."

// essential are the labels or annotations that a kubelet needs in a list. The status of the object has all of them.
func essential(all map[string]string) map[string]string {
	out, size := map[string]string{}, 0
	keys := make([]string, 0, len(all))
	for k, v := range all {
		if strings.HasPrefix(k, kubeletMark) && len(k)+len(v) <= text.MaxName {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		if size += len(k) + len(all[k]); size > maxEssential {
			break
		}
		out[k] = all[k]
	}
	return out
}

func shortSandbox(s *spec.Sandbox) proto.Message {
	item := s.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

func shortContainer(c *spec.Container) proto.Message {
	item := c.Item()
	item.Labels, item.Annotations = essential(item.Labels), essential(item.Annotations)
	return item
}

// sandboxAttributes are the attributes in stats, shortened if they are large.
func sandboxAttributes(s *spec.Sandbox) proto.Message {
	a := s.Attributes()
	if proto.Size(a) > maxAttributes {
		a.Labels, a.Annotations = essential(a.Labels), essential(a.Annotations)
	}
	return a
}

// containerAttributes are the attributes in stats, shortened if they are large.
func containerAttributes(c *spec.Container) *runtimeapi.ContainerAttributes {
	a := c.Attributes()
	if proto.Size(a) > maxAttributes {
		a.Labels, a.Annotations = essential(a.Labels), essential(a.Annotations)
	}
	return a
}

// shorten replaces the largest of encoded items until all fit into limit, and returns their size.
func shorten(items [][]byte, limit int, short func(i int) ([]byte, error)) (size int, err error) {
	order := make([]int, len(items))
	for i, b := range items {
		order[i], size = i, size+len(b)
	}
	if size <= limit {
		return size, nil
	}
	slices.SortFunc(order, func(a, b int) int { return len(items[b]) - len(items[a]) })
	for _, i := range order {
		b, err := short(i)
		if err != nil {
			return 0, err
		}
		if len(b) < len(items[i]) {
			size, items[i] = size-len(items[i])+len(b), b
		}
		if size <= limit {
			break
		}
	}
	return size, nil
}

// fitImages leaves to each image of a list one tag and one digest if the list is larger than limit.
func fitImages(images []*runtimeapi.Image, limit int) {
	if proto.Size(&runtimeapi.ListImagesResponse{Images: images}) <= limit {
		return
	}
	for i, image := range images {
		short, _ := proto.Clone(image).(*runtimeapi.Image) //nolint:errcheck // a clone has the type
		short.RepoTags = short.RepoTags[:min(len(short.RepoTags), 1)]
		short.RepoDigests = short.RepoDigests[:min(len(short.RepoDigests), 1)]
		images[i] = short
	}
}

// fitConditions makes the messages of conditions valid texts of bounded length: they repeat errors of the engine and of plugins.
func fitConditions(conditions []*runtimeapi.RuntimeCondition) {
	for _, c := range conditions {
		c.Message = text.Clean(c.Message, text.MaxMessage)
	}
}
