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

// TestKubeletEvents runs the kubelet with EventedPLEG. It lists only every five minutes and
// otherwise relies on GetContainerEvents (KEP-3386).
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
			for _, want := range []string{"Received Container Started Event", "Received Container Stopped Event"} {
				if err != nil || !strings.Contains(string(log), want) {
					t.Errorf("the kubelet's log lacks %q: %v", want, err)
				}
			}

			if strings.Contains(string(log), "Fall back to Generic PLEG") {
				t.Error("the kubelet fell back from events to polling")
			}
		})
	}
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
