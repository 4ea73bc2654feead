package conformance

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// engineCalls is how many requests to the engine one call may cause on average, with those that its
// events cause afterwards. An inspect costs Engine 29 up to 10 ms of CPU at 100 containers. A start
// and an end cause one inspect each, and each call one of its own.
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

// engineCall finds a number of requests in the metrics.
var engineCall = regexp.MustCompile(`(?m)^cri_dockerd_engine_request_duration_seconds_count\{code="[^"]*",` +
	`operation="([^"]*)"\} (\d+)$`)

// calls counts the requests to the engine by operation, without the heartbeat and the check of
// events.
func (n *node) calls(t *testing.T) map[string]int {
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

// settledCalls are the calls when the engine's events have been worked off.
func (n *node) settledCalls(t *testing.T) map[string]int {
	t.Helper()
	last := n.calls(t)
	eventually(t, "nothing is asked any more", func() bool {
		time.Sleep(150 * time.Millisecond)
		before := last
		last = n.calls(t)
		return maps.Equal(before, last)
	})

	return last
}

// TestEngineCalls counts the requests to the engine for each call in a pod's life.
func TestEngineCalls(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		const pods = 3
		ctx := t.Context()
		used := map[string]map[string]int{} // RPC, operation
		for i := range pods + 1 {
			if i == 1 {
				clear(used) // the first one loads the pause and learns how logs work
			}

			before := n.settledCalls(t)
			count := func(rpc string) {
				after := n.settledCalls(t)
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
			n.askAll(t, pod, c)
			count("lists and statuses")
			n.stop(t, c, 10)
			count("StopContainer")
			if _, err := n.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c}); err !=
				nil {
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
				t.Errorf("%s: %.1f requests to the engine, at most %.1f: %v", limit.rpc, mean, limit.most,
					used[limit.rpc])
			}
		}

		t.Logf("in a pod's life: %s requests to the engine", fmt.Sprintf("%.1f", float64(total)/pods))
	})
}

// askAll makes the calls that a kubelet makes all the time.
func (n *node) askAll(t *testing.T, pod, container string) {
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
