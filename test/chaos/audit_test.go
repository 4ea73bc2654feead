package chaos

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// staleLimit is how long the daemon may show what runs wrongly while it can see the engine: 30 s,
// by the interval of the check for a silent event stream, and room for a loaded machine.
const staleLimit = 45 * time.Second

// audit compares meanwhile what the daemon says to run with what runs in the engine.
func (r *trial) audit(ctx context.Context) {
	since := map[string]time.Time{} // when a difference was first seen
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

// differences returns what is wrong by ID, and whether daemon and engine have answered.
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

	said := map[string]bool{}
	for _, s := range sandboxes.Items {
		said[s.Id] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}

	for _, c := range containers.Containers {
		said[c.Id] = c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	}

	running, err := r.running(ctx, said)
	if err != nil {
		return nil, false
	}

	differ = map[string]string{}
	for id, runs := range running {
		listed, known := said[id]
		switch {
		case !known:
			differ[id] = "is in the engine and is not listed"
		case listed != runs:
			differ[id] = fmt.Sprintf("is listed with running %v, the engine has running %v", listed, runs)
		}

		delete(said, id)
	}

	for id := range said {
		differ[id] = "is listed and not in the engine"
	}

	return differ, true
}
