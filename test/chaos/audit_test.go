package chaos

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// staleLimit is the longest tolerated difference between the daemon and a visible engine: 30 s for
// the check of silent event streams, plus a margin for a loaded machine.
const staleLimit = 45 * time.Second

// audit continuously compares the daemon's running containers with the engine's.
func (r *trial) audit(ctx context.Context) {
	since := map[string]time.Time{} // first observation of each difference
	for sleep(ctx, 2*time.Second) {
		differ, ok := r.differences(ctx)
		if !ok {
			continue
		}

		r.losing.Lock()
		blind, sees := r.blind > 0, r.sees
		r.losing.Unlock()
		for id := range since {
			if differ[id] == "" {
				delete(since, id)
			}
		}

		for id, text := range differ {
			if since[id].IsZero() {
				since[id] = time.Now()
			}

			from := since[id]
			if from.Before(sees) {
				from = sees
			}

			if !blind && time.Since(from) > staleLimit {
				r.violate("for %s: %s %s", time.Since(since[id]).Round(time.Second), id, text)
				delete(since, id)
			}
		}
	}
}

// differences returns the differences by ID, and whether both daemon and engine have answered.
func (r *trial) differences(ctx context.Context) (differ map[string]string, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()

	sandboxes, err := r.daemon.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, false
	}

	containers, err := r.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, false
	}

	reported := map[string]bool{}
	for _, s := range sandboxes.Items {
		reported[s.Id] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}

	for _, c := range containers.Containers {
		reported[c.Id] = c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	}

	running, err := r.running(ctx, reported)
	if err != nil {
		return nil, false
	}

	differ = map[string]string{}
	for id, runs := range running {
		listed, known := reported[id]
		switch {
		case !known:
			differ[id] = "exists in the engine and is not listed"
		case listed != runs:
			differ[id] = fmt.Sprintf("is listed with running=%v, the engine reports running=%v", listed, runs)
		}

		delete(reported, id)
	}

	for id := range reported {
		differ[id] = "is listed but does not exist in the engine"
	}

	return differ, true
}
