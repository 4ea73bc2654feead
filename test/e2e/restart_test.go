package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// nodePod is on the host network and shares its PIDs.
const nodePod = `apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  hostNetwork: true
  shareProcessNamespace: true
  containers:
  - name: agent
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "trap exit TERM; while :; do sleep 1 & wait; done"]
`

// TestEngineRestart restarts an engine without live-restore, once regularly and once by SIGKILL.
// Both end all containers. The kubelet must restore all pods with addresses and host ports, and
// nothing of the old ones may remain after the removal of the pods.
func TestEngineRestart(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepareOn(t, engines.Start(t, v, "--live-restore=false"))
			k.run(t, k.config)
			k.apply(t, "web", webPod)
			k.apply(t, "agent", nodePod)
			for name, end := range map[string]func(engines.TB){"stop": k.engine.Stop, "kill": k.engine.Kill} {
				k.waitRunning(t, "web")
				k.waitReady(t, "agent")
				before := k.sandboxes(t, runtimeapi.PodSandboxState_SANDBOX_READY)
				end(t)
				k.engine.Restart(t)
				k.awaitOthers(t, name, before)
				k.checkWeb(t, name)
			}

			k.removeAll(t, "web", "agent")
		})
	}
}

// waitReady waits until all containers of a pod are ready. A standalone kubelet reports no address
// for a pod on the host network.
func (k *kubelet) waitReady(t *testing.T, name string) {
	t.Helper()
	eventually(t, "pod "+name+" is ready", func() error {
		p := k.pod(t, name)
		if p == nil || p.Status.Phase != "Running" || len(p.Status.ContainerStatuses) == 0 {
			return fmt.Errorf("%+v", p)
		}

		for _, c := range p.Status.ContainerStatuses {
			if !c.Ready {
				return fmt.Errorf("container %s: %+v", c.Name, c)
			}
		}

		return nil
	})
}

// sandboxes returns the IDs of the sandboxes in a state.
func (k *kubelet) sandboxes(t *testing.T, state runtimeapi.PodSandboxState) (ids []string) {
	t.Helper()
	r, err := k.daemon.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, sb := range r.Items {
		if sb.State == state {
			ids = append(ids, sb.Id)
		}
	}

	return ids
}

// awaitOthers waits until both pods run in new sandboxes.
func (k *kubelet) awaitOthers(t *testing.T, name string, before []string) {
	t.Helper()
	eventually(t, name+": the pods are restored", func() error {
		r, err := k.daemon.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}

		ready := 0
		for _, sb := range r.Items {
			if sb.State == runtimeapi.PodSandboxState_SANDBOX_READY && !slices.Contains(before, sb.Id) {
				ready++
			}
		}

		if ready != 2 {
			return fmt.Errorf("%d new sandboxes are ready: %v", ready, r.Items)
		}

		return nil
	})

	k.waitReady(t, "agent")
	p := k.waitRunning(t, "web")
	for _, c := range p.Status.ContainerStatuses {
		if c.RestartCount == 0 {
			t.Errorf("%s: container %s was not restarted: %+v", name, c.Name, c)
		}
	}
}

// checkWeb fetches the page of the pod web by its address and its host port.
func (k *kubelet) checkWeb(t *testing.T, name string) {
	t.Helper()
	for _, host := range []string{k.pod(t, "web").Status.PodIP + ":8080", "192.0.2.1:18080"} {
		eventually(t, name+": "+host+" answers", func() error {
			page, err := k.fetch("http://" + host + "/")
			if err == nil && page != "the page of the pod\n" {
				err = fmt.Errorf("%q", page)
			}
			return err
		})
	}
}

// removeAll removes pods and checks for leftovers of them and their predecessors.
func (k *kubelet) removeAll(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Remove(filepath.Join(k.manifests, name+".yaml")); err != nil {
			t.Fatal(err)
		}
	}

	docker := k.engine.Docker(t)
	eventually(t, "all resources are released", func() error {
		containers, err := docker.ContainerList(t.Context(), client.ContainerListOptions{All: true})
		if err != nil || len(containers.Items) > 0 {
			return fmt.Errorf("%d containers, %w", len(containers.Items), err)
		}

		for what, pattern := range map[string]string{
			"addresses":  filepath.Join(k.daemon.LeaseDir, "*", "10.*"),
			"CNI cache":  filepath.Join(k.daemon.CacheDir, "*"),
			"namespaces": filepath.Join(k.daemon.PinDir, "*"),
		} {
			if remaining, _ := filepath.Glob(pattern); len(remaining) > 0 {
				return fmt.Errorf("%s: %v", what, remaining)
			}
		}

		return k.noTraces()
	})
}

// noTraces checks the node's network for interfaces and port rules of pods, and the mounts for
// namespaces.
func (k *kubelet) noTraces() error {
	for what, line := range map[string]string{
		"interfaces": "ip -o link show type veth",
		"port rules": "iptables-save -t nat | grep 18080 || true",
		"mounts":     "grep ' /run/netns/' /proc/self/mounts || true",
	} {
		out, err := k.engine.Command("sh", "-c", line).CombinedOutput()
		if remaining := strings.TrimSpace(string(out)); err != nil || remaining != "" {
			return fmt.Errorf("%s: %s, %w", what, remaining, err)
		}
	}

	return nil
}
