package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
)

const checkpointPod = `apiVersion: v1
kind: Pod
metadata: {name: state, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "while true; do sleep 1; done"]
`

// TestKubeletCheckpoint takes a checkpoint through the kubelet's API. Without criu, the kubelet
// reports the reason.
func TestKubeletCheckpoint(t *testing.T) {
	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := startKubelet(t, v)
			k.apply(t, "state", checkpointPod)
			k.waitRunning(t, "state")
			if code, body := k.checkpoint(t); code == http.StatusOK || !strings.Contains(body, "criu") {
				t.Errorf("without criu: %d, %s", code, body)
			}

			k.engine.InstallCRIU(t)
			code, body := k.checkpoint(t)
			if code != http.StatusOK {
				t.Fatalf("status %d: %s", code, body)
			}

			var r struct{ Items []string }
			if err := json.Unmarshal([]byte(body), &r); err != nil || len(r.Items) != 1 {
				t.Fatalf("answer %s: %v", body, err)
			}
			if st, err := os.Stat(k.engine.Path(r.Items[0])); err != nil || st.Size() == 0 {
				t.Errorf("archive %s: %v, %v", r.Items[0], st, err)
			}
		})
	}
}

// checkpoint asks the kubelet for a checkpoint of the container of checkpointPod.
func (k *kubelet) checkpoint(t *testing.T) (code int, body string) {
	t.Helper()
	r, err := k.client.Post("https://127.0.0.1:10250/checkpoint/default/state-node/main?timeout=60", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()

	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(fmt.Errorf("read the answer: %w", err))
	}

	return r.StatusCode, string(b)
}
