// Package e2e tests the daemon with a real standalone kubelet and static pods. It contains only
// tests.
package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
)

// kubelet is a standalone kubelet on an engine with a daemon.
type kubelet struct {
	engine    *engines.Engine
	daemon    *engines.Daemon
	manifests string
	config    string // default configuration
	env       []string
	client    http.Client
}

// gate returns a line of the kubelet's configuration that enables a feature, for kubelets older
// than the minor version in which it is on by default. A newer one may not know the gate any more.
func gate(t *testing.T, feature string, since int) string {
	t.Helper()
	if engines.KubernetesMinor(t) >= since {
		return ""
	}
	return "featureGates: {" + feature + ": true}\n"
}

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: CGROUP
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://SOCKET
staticPodPath: DIR/manifests
enableServer: true
enableDebuggingHandlers: true
fileCheckFrequency: 1s
syncFrequency: 1s
resolvConf: DIR/resolv.conf
containerLogMaxSize: 1Mi
containerLogMaxFiles: 3
containerLogMonitorInterval: 3s
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "10Mi", nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}
`

// startKubelet starts an engine, a daemon and a kubelet.
func startKubelet(t *testing.T, v engines.Version) *kubelet {
	t.Helper()
	k := prepare(t, v)
	k.run(t, k.config)
	return k
}

// prepare starts an engine and a daemon with additional flags.
func prepare(t *testing.T, v engines.Version, flags ...string) *kubelet {
	t.Helper()
	return prepareOn(t, engines.Start(t, v), flags...)
}

// prepareOn starts a daemon with additional flags on an engine.
func prepareOn(t *testing.T, e *engines.Engine, flags ...string) *kubelet {
	t.Helper()
	e.ImportBusybox(t)
	k := &kubelet{
		engine:    e,
		daemon:    e.Daemon(t, flags...),
		manifests: filepath.Join(e.Dir, "manifests"),
	}
	k.client = http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext:     e.DialContext,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the kubelet signs for itself
	}}
	if err := os.Mkdir(k.manifests, 0o755); err != nil {
		t.Fatal(err)
	}

	k.config = strings.NewReplacer("CGROUP", e.CgroupParent, "SOCKET", k.daemon.Socket, "DIR",
		e.Dir).Replace(kubeletConfig)
	if err := os.WriteFile(filepath.Join(e.Dir, "resolv.conf"), []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	makeCgroups(t, e)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(e.Dir, "kubelet.log"))
			lines := strings.Split(string(b), "\n")
			t.Logf("end of the kubelet's log:\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})

	return k
}

// run starts the kubelet with a configuration and flags. It must not be running.
func (k *kubelet) run(t *testing.T, config string, flags ...string) {
	t.Helper()
	file := filepath.Join(k.engine.Dir, "kubelet.yaml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}

	args := append(slices.Clone(k.env), engines.KubernetesProgram(t, "kubelet", "kubelet"),
		"--config="+file, "--hostname-override=node", "--node-ip=192.0.2.1", "--v=2")
	k.engine.Background(t, "kubelet", "env", append(args, flags...)...)
	eventually(t, "the kubelet is healthy", func() error { _, err := k.get("/healthz"); return err })
}

// makeCgroups creates the kubelet's root cgroup in every hierarchy of the engine's node, and
// initialises the empty cpusets.
func makeCgroups(t *testing.T, e *engines.Engine) {
	t.Helper()
	script := `set -e
		for h in /sys/fs/cgroup/*; do
			[ -e "$h/cgroup.procs" ] || continue
			mkdir -p "$h$1"
			for f in cpuset.cpus cpuset.mems; do [ ! -e "$h/$f" ] || cat "$h/$f" > "$h$1/$f"; done
		done`
	if out, err := e.Command("sh", "-c", script, "sh", e.CgroupParent).CombinedOutput(); err != nil {
		t.Fatalf("control groups of the kubelet: %v\n%s", err, out)
	}
}

// get fetches a path of the kubelet's server.
func (k *kubelet) get(path string) (string, error) { return k.fetch("https://127.0.0.1:10250" + path) }

// fetch fetches a page from inside the node.
func (k *kubelet) fetch(url string) (string, error) {
	r, err := k.client.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()

	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, r.Status, b)
	}

	return string(b), err
}

// dial connects to the kubelet's server.
func (k *kubelet) dial(ctx context.Context) (net.Conn, error) {
	c, err := k.engine.DialContext(ctx, "tcp", "127.0.0.1:10250")
	if err != nil {
		return nil, err
	}
	return tls.Client(c, &tls.Config{InsecureSkipVerify: true}), nil //nolint:gosec // the kubelet signs for itself
}

// pod is the kubelet's state of a pod.
type pod struct {
	Metadata struct{ Name, UID string }
	Status   struct {
		Phase, PodIP          string
		ContainerStatuses     []containerStatus
		InitContainerStatuses []containerStatus
	}
}

type containerStatus struct {
	Name, ContainerID string
	Ready             bool
	RestartCount      int
	State, LastState  struct {
		Running    *struct{}
		Waiting    *struct{ Reason, Message string }
		Terminated *struct {
			ExitCode int
			Reason   string
		}
	}
}

// pod returns a static pod by its name in the manifest, nil if the kubelet has none.
func (k *kubelet) pod(t *testing.T, name string) *pod {
	t.Helper()
	body, err := k.get("/pods")
	if err != nil {
		t.Fatal(err)
	}

	var list struct{ Items []*pod }
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		t.Fatal(err)
	}

	for _, p := range list.Items {
		if p.Metadata.Name == name+"-node" {
			return p
		}
	}

	return nil
}

// container returns the status of one of a pod's containers.
func (p *pod) container(name string) containerStatus {
	if p != nil {
		for _, c := range append(p.Status.ContainerStatuses, p.Status.InitContainerStatuses...) {
			if c.Name == name {
				return c
			}
		}
	}

	return containerStatus{}
}

// apply writes a static pod's manifest atomically.
func (k *kubelet) apply(t *testing.T, name, manifest string) {
	t.Helper()
	tmp := filepath.Join(k.engine.Dir, name+".tmp")
	if err := os.WriteFile(tmp, []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}

	if err := os.Rename(tmp, filepath.Join(k.manifests, name+".yaml")); err != nil {
		t.Fatal(err)
	}
}

// waitRunning waits until all containers of a pod are ready.
func (k *kubelet) waitRunning(t *testing.T, name string) *pod {
	t.Helper()
	var p *pod
	eventually(t, "pod "+name+" runs", func() error {
		p = k.pod(t, name)
		if p == nil || p.Status.Phase != "Running" || p.Status.PodIP == "" {
			return fmt.Errorf("%+v", p)
		}

		for _, c := range p.Status.ContainerStatuses {
			if !c.Ready {
				return fmt.Errorf("container %s: %+v", c.Name, c)
			}
		}

		return nil
	})

	return p
}

// eventually retries for up to 90 seconds until try succeeds.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	within(t, 90*time.Second, what, try)
}

// within retries until try succeeds or the timeout expires.
func within(t *testing.T, timeout time.Duration, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()

	for {
		err := try()
		if err == nil {
			return
		}

		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s: %v", timeout, what, err)
		}

		<-tick.C
	}
}
