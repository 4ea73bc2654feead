package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

const webPod = `apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: init
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "echo the page of the pod > /data/index.html"]
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: web
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [httpd, -f, -p, "8080", -h, /data]
    ports: [{containerPort: 8080, hostPort: 18080}]
    resources: {requests: {cpu: 10m, memory: 8Mi}, limits: {cpu: 500m, memory: 64Mi}}
    startupProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 30}
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
    livenessProbe: {exec: {command: [cat, /data/index.html]}, periodSeconds: 1, timeoutSeconds: 10}
    volumeMounts: [{name: data, mountPath: /data}]
  - name: tick
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    stdin: true
    command: [sh, -c, "echo first tick; while read x; do echo heard $x; done; sleep 100000"]
    securityContext: {runAsUser: 65534, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
  volumes: [{name: data, emptyDir: {}}]
`

const crashPod = `apiVersion: v1
kind: Pod
metadata: {name: crash, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: crash
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "echo about to fail; exit 3"]
`

// TestKubelet runs pods through their lifecycle under the kubelet. The steps build on each other.
func TestKubelet(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := startKubelet(t, v)
			k.apply(t, "web", webPod)
			k.apply(t, "crash", crashPod)

			for _, step := range []struct {
				name string
				do   func(*testing.T, *kubelet)
			}{
				{"running", running}, {"pages", pages}, {"logs", logs}, {"streams", streams}, {"crash", crash},
				{"rotation", rotation}, {"daemon killed", daemonKilled}, {"deleted", deleted},
			} {
				if !t.Run(step.name, func(t *testing.T) { step.do(t, k) }) {
					t.FailNow()
				}
			}
		})
	}
}

func running(t *testing.T, k *kubelet) {
	p := k.waitRunning(t, "web")
	if i := p.container("init"); i.State.Terminated == nil || i.State.Terminated.ExitCode != 0 ||
		i.State.Terminated.Reason != "Completed" {
		t.Errorf("the init container: %+v", i)
	}

	if len(p.Status.ContainerStatuses) != 2 || !strings.HasPrefix(p.container("web").ContainerID, "docker://") {
		t.Errorf("containers: %+v", p.Status.ContainerStatuses)
	}
}

func pages(t *testing.T, k *kubelet) {
	for what, url := range map[string]string{
		"pod IP":    "http://" + k.pod(t, "web").Status.PodIP + ":8080/",
		"host port": "http://192.0.2.1:18080/",
	} {
		if page, err := k.fetch(url); err != nil || page != "the page of the pod\n" {
			t.Errorf("%s: %q, %v", what, page, err)
		}
	}
}

func logs(t *testing.T, k *kubelet) {
	if text, err := k.get("/containerLogs/default/web-node/tick"); err != nil ||
		!strings.HasPrefix(text, "first tick\n") {
		t.Errorf("log of tick: %q, %v", text, err)
	}

	eventually(t, "log of the crashing container", func() error {
		text, err := k.get("/containerLogs/default/crash-node/crash")
		if err == nil && !strings.Contains(text, "about to fail\n") {
			err = fmt.Errorf("%q", text)
		}
		return err
	})
}

func crash(t *testing.T, k *kubelet) {
	eventually(t, "the crashing container is restarted", func() error {
		c := k.pod(t, "crash").container("crash")
		last := c.LastState.Terminated
		if c.RestartCount < 1 || last == nil {
			return fmt.Errorf("%+v", c)
		}
		if last.ExitCode != 3 || last.Reason != "Error" {
			t.Fatalf("lastState: %+v", *last)
		}

		return nil
	})
}

func daemonKilled(t *testing.T, k *kubelet) {
	before := k.waitRunning(t, "web")
	k.daemon.Kill(t)
	k.daemon.Restart(t)
	k.apply(t, "later", strings.NewReplacer("name: web,", "name: later,", ", hostPort: 18080", "").Replace(webPod))
	k.waitRunning(t, "later")
	after := k.waitRunning(t, "web")
	if before.Status.PodIP != after.Status.PodIP {
		t.Errorf("the pod's IP was %s, now it is %s", before.Status.PodIP, after.Status.PodIP)
	}

	for _, c := range before.Status.ContainerStatuses {
		if now := after.container(c.Name); now.ContainerID != c.ContainerID || now.RestartCount != c.RestartCount {
			t.Errorf("container %s was %+v, now it is %+v", c.Name, c, now)
		}
	}
}

// deleted removes the manifests and checks for leftovers.
func deleted(t *testing.T, k *kubelet) {
	ip := k.pod(t, "web").Status.PodIP
	for _, name := range []string{"web", "crash", "chatty", "later"} {
		if err := os.Remove(filepath.Join(k.manifests, name+".yaml")); err != nil {
			t.Fatal(err)
		}
	}

	eventually(t, "pods and containers are removed", func() error {
		pods, err := k.daemon.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}

		containers, err := k.daemon.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
		if err == nil && len(pods.Items)+len(containers.Containers) > 0 {
			err = fmt.Errorf("%d pods, %d containers", len(pods.Items), len(containers.Containers))
		}

		return err
	})

	for what, pattern := range map[string]string{
		"address": filepath.Join(k.daemon.LeaseDir, "*", "10.*"), "CNI cache": filepath.Join(k.daemon.CacheDir, "*"),
		"pin": filepath.Join(k.daemon.PinDir, "*"),
	} {
		if remaining, _ := filepath.Glob(pattern); len(remaining) > 0 {
			t.Errorf("%s remains: %v", what, remaining)
		}
	}

	eventually(t, "the logs are removed", func() error {
		remaining, _ := filepath.Glob(filepath.Join(k.engine.Dir, "root/var/log/pods/*/*/*.log"))
		if len(remaining) > 0 {
			return errors.New(strings.Join(remaining, ", "))
		}
		return nil
	})

	if page, err := k.fetch("http://" + ip + ":8080/"); err == nil {
		t.Errorf("the pod's address still answers: %s", page)
	}
}
