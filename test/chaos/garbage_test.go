package chaos

import (
	"context"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// collectGarbage removes the listed objects of ended pods, like a kubelet removes sandboxes without
// a pod (containerGC.evictSandboxes): with a silent event stream, a sandbox may appear after its
// pod has ended.
func (k *kubelet) collectGarbage(ctx context.Context) {
	for sleep(ctx, 2*time.Second) {
		listed, err := k.listedPods(ctx)
		if err != nil {
			continue
		}

		k.mu.Lock()
		ended := slices.Clone(k.ended)
		k.mu.Unlock()
		for _, p := range ended {
			if !listed[p.uid] {
				continue
			}
			if remaining, err := p.remove(ctx); err == nil && remaining == 0 {
				p.removeCgroups()
			}
		}
	}
}

// listedPods returns the UIDs of all pods with a listed sandbox or container.
func (k *kubelet) listedPods(ctx context.Context) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()

	sandboxes, err := k.daemon.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}

	containers, err := k.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}

	listed := map[string]bool{}
	for _, s := range sandboxes.Items {
		listed[s.Metadata.Uid] = true
	}

	for _, c := range containers.Containers {
		listed[c.Labels["io.kubernetes.pod.uid"]] = true
	}

	return listed, nil
}
