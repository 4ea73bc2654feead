package conformance

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// engineCalls limits the engine requests of each call on average, including the requests caused by
// its events. An inspect costs Engine 29 up to 10 ms of CPU at 100 containers. A start and an exit
// cause one inspect each, and each call makes one request of its own.
var engineCalls = []struct {
	rpc  string
	most float64
}{
	{"RunPodSandbox", 4},
	{"CreateContainer", 2},
	{"StartContainer", 3},
	{"ExecSync", 3},
	{"StopContainer", 3},
	{"RemoveContainer", 2},
	{"StopPodSandbox", 3},
	{"RemovePodSandbox", 2},
	{"lists and statuses", 0},
}

// engineCall matches the request counters of the daemon's metrics.
var engineCall = regexp.MustCompile(`(?m)^cri_dockerd_engine_request_duration_seconds_count\{code="[^"]*",` +
	`operation="([^"]*)"\} (\d+)$`)

// engineRequests counts the engine requests by operation, without the heartbeat and the event
// stream.
func (n *node) engineRequests(t *testing.T) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, m := range engineCall.FindAllStringSubmatch(n.Metrics(t), -1) {
		count, err := strconv.Atoi(m[2])
		if err != nil {
			t.Fatal(err)
		}
		out[m[1]] += count
	}

	for _, op := range []string{"HEAD /_ping", "GET /_ping", "GET /events"} {
		delete(out, op)
	}

	return out
}

// settledRequests waits until the daemon has handled all engine events and returns the counters.
func (n *node) settledRequests(t *testing.T) map[string]int {
	t.Helper()
	last := n.engineRequests(t)
	eventually(t, "end of the engine requests", func() bool {
		time.Sleep(150 * time.Millisecond)
		before := last
		last = n.engineRequests(t)
		return maps.Equal(before, last)
	})

	return last
}

// TestEngineCalls counts the engine requests of each call in a pod's lifecycle.
func TestEngineCalls(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		const pods = 3
		ctx := t.Context()
		used := map[string]map[string]int{} // RPC, operation
		for i := range pods + 1 {
			if i == 1 {
				clear(used) // the first pod loads the pause image and detects the log mode
			}

			before := n.settledRequests(t)
			count := func(rpc string) {
				after := n.settledRequests(t)
				if used[rpc] == nil {
					used[rpc] = map[string]int{}
				}

				for op, c := range after {
					if c > before[op] {
						used[rpc][op] += c - before[op]
					}
				}

				before = after
			}

			cfg := n.podConfig(t)
			pod := n.runPod(t, cfg)
			count("RunPodSandbox")
			c := n.create(t, pod, cfg, n.containerConfig(sh("trap exit TERM; while :; do sleep 1 & wait; done")))
			count("CreateContainer")
			n.startID(t, c)
			count("StartContainer")
			n.exec(t, c, "true")
			count("ExecSync")
			n.pollLikeKubelet(t, pod, c)
			count("lists and statuses")
			n.stop(t, c, 10)
			count("StopContainer")
			if _, err := n.Runtime.RemoveContainer(ctx,
				&runtimeapi.RemoveContainerRequest{ContainerId: c}); err != nil {
				t.Error(err)
			}

			count("RemoveContainer")
			n.stopPod(t, pod)
			count("StopPodSandbox")
			n.removePod(t, pod)
			count("RemovePodSandbox")
		}

		total := 0
		for _, limit := range engineCalls {
			sum := 0
			for _, op := range slices.Sorted(maps.Keys(used[limit.rpc])) {
				sum += used[limit.rpc][op]
				t.Logf("%s: %s × %.1f", limit.rpc, op, float64(used[limit.rpc][op])/pods)
			}

			total += sum
			if mean := float64(sum) / pods; mean > limit.most {
				t.Errorf("%s: %.1f engine requests, at most %.1f: %v", limit.rpc, mean, limit.most,
					used[limit.rpc])
			}
		}

		t.Logf("lifecycle of a pod: %.1f engine requests", float64(total)/pods)
	})
}

// pollLikeKubelet makes the periodic calls of a kubelet.
func (n *node) pollLikeKubelet(t *testing.T, pod, container string) {
	t.Helper()
	ctx := t.Context()
	for range 3 {
		_, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err == nil {
			_, err = n.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		}

		if err == nil {
			_, err = n.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
		}

		if err == nil {
			_, err = n.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
		}

		if err != nil {
			t.Fatal(err)
		}

		n.podStatus(t, pod)
		n.containerStatus(t, container)
		n.imageStatus(t, n.image)
	}
}
