package cri

import (
	"slices"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/text"
)

// Limits for responses, in bytes. A kubelet accepts 16 MiB; package rpc rejects larger responses.
const (
	maxList = 15 << 20 // of a list; the largest items of a larger list are shortened
	maxInfo = 1 << 20  // of the info in a verbose response
)

// shorten replaces the largest encoded items until all fit into limit, and returns their size.
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

// fitImages reduces each image to one tag and one digest if the list is larger than limit.
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

// fitConditions truncates the messages of conditions and makes them valid UTF-8. They quote errors
// of the engine and of plugins.
func fitConditions(conditions []*runtimeapi.RuntimeCondition) {
	for _, c := range conditions {
		c.Message = text.Clean(c.Message, text.MaxMessage)
	}
}
