package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
)

const limitedPod = `apiVersion: v1
kind: Pod
metadata:
  name: limited
  namespace: default
  annotations:
    ulimits.nri.containerd.io/container.main: |
      - {type: RLIMIT_NOFILE, soft: 1234, hard: 4321}
      - {type: nproc, soft: 500, hard: 600}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
  - name: other
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
`

// hookedPod and plainPod have the same container. The plugin adds a hook to that of the former.
const hookedPod = `apiVersion: v1
kind: Pod
metadata:
  name: NAME
  namespace: default
  annotations: {ANNOTATION: /bin/true}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
`

// TestKubeletNRI runs a plugin of the NRI project, which sets limits by the annotations of a pod.
// It is of an older version of NRI than the daemon's library. The default validator refuses the
// hook of a second plugin.
func TestKubeletNRI(t *testing.T) {
	plugin := filepath.Join(t.TempDir(), "ulimit-adjuster")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", plugin,
		"github.com/containerd/nri/plugins/ulimit-adjuster")
	build.Dir = "../nri"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}

	hooks := filepath.Join(t.TempDir(), "nriplugin")
	engines.Build(t, hooks, "cri-dockerd/test/nriplugin", "", false)
	rules := filepath.Join(t.TempDir(), "validator.yaml")
	if err := os.WriteFile(rules, []byte("enable: true\nrejectOCIHookAdjustment: true\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v, "--nri-socket=/var/run/nri/nri.sock", "--nri-validator-config="+rules)
			k.engine.Background(t, "ulimit-adjuster", plugin, "-idx", "10")
			k.engine.Background(t, "nriplugin", hooks, "-idx", "20")
			eventually(t, "the plugins are connected", func() error {
				if got := lines(k.daemon.Metrics(t), "cri_dockerd_nri_plugins "); got != "cri_dockerd_nri_plugins 2\n" {
					return fmt.Errorf("metrics: %q", got)
				}
				return nil
			})

			k.run(t, k.config)
			k.apply(t, "limited", limitedPod)
			pod := k.waitRunning(t, "limited")
			for name, want := range map[string]bool{"main": true, "other": false} {
				_, id, _ := strings.Cut(pod.container(name).ContainerID, "://")
				limits := strings.Join(strings.Fields(k.exec(t, id, "cat /proc/1/limits")), " ")
				for _, limit := range []string{"Max open files 1234 4321", "Max processes 500 600"} {
					if strings.Contains(limits, limit) != want {
						t.Errorf("container %s has %q: %v, want %v; limits: %s", name, limit, !want, want, limits)
					}
				}
			}
			testRefusedHook(t, k)
		})
	}
}

// testRefusedHook runs a pod with a refused hook, and one without it.
func testRefusedHook(t *testing.T, k *kubelet) {
	t.Helper()
	manifest := func(name, annotation string) string {
		return strings.NewReplacer("NAME", name, "ANNOTATION", annotation).Replace(hookedPod)
	}
	k.apply(t, "hooked", manifest("hooked", "hook"))
	k.apply(t, "plain", manifest("plain", "other"))
	eventually(t, "the refusal of the hook", func() error {
		c := k.pod(t, "hooked").container("main")
		if w := c.State.Waiting; w == nil || w.Reason != "CreateContainerError" ||
			!strings.Contains(w.Message, "OCI hook") || !strings.Contains(w.Message, "20-nriplugin") {
			return fmt.Errorf("the container is %+v", c)
		}
		return nil
	})

	plain := k.waitRunning(t, "plain")
	if plain.container("main").ContainerID == "" {
		t.Error("the pod without a hook has no container")
	}
}

// lines returns the lines of a text with a prefix.
func lines(text, prefix string) string {
	var out []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, prefix) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}
