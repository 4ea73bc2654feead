package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
)

const shortLivedPod = `apiVersion: v1
kind: Pod
metadata: {name: again}
spec:
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: cri-test/busybox, imagePullPolicy: Never, command: [sh, -c, "sleep 1; exit 3"]}
`

// TestKubeletEvents runs the kubelet with EventedPLEG (KEP-3386). Up to 1.36 it lists only every
// five minutes and otherwise relies on GetContainerEvents. From 1.37 on, the end of a container
// makes it list at once.
func TestKubeletEvents(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v)
			k.run(t, k.config+"featureGates: {EventedPLEG: true}\n", "--v=4")
			k.apply(t, "again", shortLivedPod)
			restarts := func(want int) {
				t.Helper()
				eventually(t, fmt.Sprint("the kubelet has seen ", want, " exits"), func() error {
					if c := k.pod(t, "again").container("main"); c.RestartCount < want ||
						c.LastState.Terminated == nil || c.LastState.Terminated.ExitCode != 3 {
						return fmt.Errorf("%+v", c)
					}
					return nil
				})
			}

			restarts(1)
			metrics, err := k.get("/metrics")
			if err != nil || !strings.Contains(metrics, "\nkubelet_evented_pleg_connection_success_count 1\n") ||
				strings.Contains(metrics, "\nkubelet_evented_pleg_connection_error_count 1") {
				t.Errorf("event connections of the kubelet: %v\n%s", err, grep(metrics, "evented_pleg"))
			}

			log, err := os.ReadFile(filepath.Join(k.engine.Dir, "kubelet.log"))
			messages, fallback := eventMessages(t)
			for _, want := range messages {
				if err != nil || !strings.Contains(string(log), want) {
					t.Errorf("the kubelet's log lacks %q: %v", want, err)
				}
			}

			if strings.Contains(string(log), fallback) {
				t.Error("the kubelet fell back from events to polling")
			}
		})
	}
}

// eventMessages returns log messages of the kubelet under test: those of processed events, and the
// one of a kubelet that stops using events.
func eventMessages(t *testing.T) (processed []string, fallback string) {
	t.Helper()
	if engines.KubernetesMinor(t) < 37 {
		return []string{
			"Received Container Started Event", "Received Container Stopped Event",
		}, "Fall back to Generic PLEG"
	}

	return []string{
		"container_event_type:CONTAINER_STARTED_EVENT", "requested pod relist after container termination",
	}, "disabling container-termination fast path"
}

// grep returns the lines containing a word.
func grep(text, word string) (out string) {
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			out += line
		}
	}
	return out
}
