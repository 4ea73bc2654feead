package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

const sleepPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: default}
spec:
  hostNetwork: HOST
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
`

const netConf = `{"cniVersion":"1.1.0","name":"test","plugins":[{"type":"bridge","bridge":"test0","isGateway":true,"ipMasq":true,"ipam":{"type":"host-local",
	"ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`

// How long a network's coming and going may take to be seen.
const (
	daemonSees = 2 * time.Second
	// A kubelet that starts asks the runtime every 100 ms until its node is ready, for two minutes
	// at most (Kubelet.fastStatusUpdateOnce).
	startingKubeletSees = 2 * time.Second
	// Afterwards it asks every 5 s (Kubelet.Run, updateRuntimeUp) and tells of it with the next
	// status of the node, here every second.
	kubeletSees = 5*time.Second + time.Second + 2*time.Second
)

// TestKubeletNetwork walks a node through the coming and going of its network; the kubelet's own
// node object says what it makes of it.
func TestKubeletNetwork(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v, "--network-plugin=cni", "--pod-cidr=", "--cni-bin-dir="+engines.Plugins())
			api, kubeconfig := k.serveAPI(t, map[string][]object{})
			k.run(t, k.config+"contentType: application/json\nnodeStatusUpdateFrequency: 1s\n", kubeconfig)
			for name, host := range map[string]string{"host": "true", "waits": "false"} {
				k.apply(t, name, strings.NewReplacer("NAME", name, "HOST", host).Replace(sleepPod))
			}

			notReady := func() error {
				c := api.nodeReady()
				// Without reasons of its own: a kubelet that has begun before its node was
				// registered makes its CSINode up to 23 s later.
				if why := fmt.Sprint(c["message"]); c["status"] != "False" ||
					!strings.Contains(why, "/etc/cni/net.d") || strings.Contains(why, "CSINode") {
					return fmt.Errorf("%v", c)
				}

				return nil
			}

			eventually(t, "the node is not ready, and says why", notReady)
			k.waitRunning(t, "host")
			eventually(t, "the pod waits for the network", func() error {
				if !api.said("waits-node", "network is not ready") {
					return errors.New("no event of it")
				}
				return nil
			})

			if p := k.pod(t, "waits"); p == nil || p.Status.Phase != "Pending" {
				t.Errorf("the pod that waits: %+v", p)
			}

			k.networkAppears(t, api, startingKubeletSees)
			if p := k.waitRunning(t, "waits"); !strings.HasPrefix(p.Status.PodIP, "10.99.0.") {
				t.Errorf("the pod's address: %s", p.Status.PodIP)
			}

			if err := os.Remove(filepath.Join(k.engine.Dir, confFile)); err != nil {
				t.Fatal(err)
			}

			within(t, kubeletSees, "the node is not ready again", notReady)
			k.networkAppears(t, api, kubeletSees)
			for _, name := range []string{"host", "waits"} {
				if c := k.waitRunning(t, name).container("main"); c.RestartCount != 0 {
					t.Errorf("%s did not go on: %+v", name, c)
				}
			}
		})
	}
}

// confFile is the network's configuration as seen outside, below the engine's folder.
const confFile = "root/etc/cni/net.d/10-test.conflist"

// networkAppears writes the configuration and waits until the daemon's status and then the
// kubelet's node are ready.
func (k *kubelet) networkAppears(t *testing.T, api *apiServer, patience time.Duration) {
	t.Helper()
	file := filepath.Join(k.engine.Dir, confFile)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}

	begin := time.Now()
	if err := os.WriteFile(file, []byte(netConf), 0o644); err != nil {
		t.Fatal(err)
	}

	within(t, daemonSees, "the daemon says that the network is ready", func() error {
		return k.networkReady(t.Context())
	})
	daemon := time.Since(begin)
	within(t, patience-daemon, "the node is ready", func() error {
		if c := api.nodeReady(); c["status"] != "True" {
			return fmt.Errorf("%v", c)
		}
		return nil
	})

	t.Logf("ready: the daemon after %v, the node after %v", daemon, time.Since(begin))
}

// networkReady is nil when the daemon says so.
func (k *kubelet) networkReady(ctx context.Context) error {
	s, err := k.daemon.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}

	for _, c := range s.Status.Conditions {
		if c.Type == runtimeapi.NetworkReady && !c.Status {
			return errors.New(c.Message)
		}
	}

	return nil
}
