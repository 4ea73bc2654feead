package cri

import (
	"slices"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/text"
)

// Bounds of answers in bytes. A kubelet takes 16 MiB; package rpc refuses what is larger.
const (
	maxList = 15 << 20 // of a list; one that is larger has its largest items shortened
	maxInfo = 1 << 20  // of the info in a verbose answer
)

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

// fitConditions makes the messages of conditions valid texts of bounded length: they repeat errors
// of the engine and of plugins.
func fitConditions(conditions []*runtimeapi.RuntimeCondition) {
	for _, c := range conditions {
		c.Message = text.Clean(c.Message, text.MaxMessage)
	}
}
