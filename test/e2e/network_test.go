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

const netConf = `{"cniVersion":"1.1.0","name":"test","plugins":[{"type":"bridge","bridge":"test0","isGateway":true,
	"ipMasq":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`

// Time limits for detecting an added or removed network.
const (
	daemonTimeout = 2 * time.Second
	// A starting kubelet queries the runtime every 100 ms until its node is ready, for up to two
	// minutes (Kubelet.fastStatusUpdateOnce).
	startingKubeletTimeout = 2 * time.Second
	// Afterwards it queries every 5 s (Kubelet.Run, updateRuntimeUp) and reports the change with
	// the next node status, here every second.
	kubeletTimeout = 5*time.Second + time.Second + 2*time.Second
)

// TestKubeletNetwork adds and removes a node's network, and checks the kubelet's node object.
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
				// Other reasons must be absent: a kubelet started before the registration of its
				// node takes up to 23 s to create its CSINode.
				if message := fmt.Sprint(c["message"]); c["status"] != "False" ||
					!strings.Contains(message, "/etc/cni/net.d") || strings.Contains(message, "CSINode") {
					return fmt.Errorf("%v", c)
				}

				return nil
			}

			eventually(t, "the node is not ready and reports the reason", notReady)
			k.waitRunning(t, "host")
			eventually(t, "the pod waits for the network", func() error {
				if !api.hasEvent("waits-node", "network is not ready") {
					return errors.New("no event")
				}
				return nil
			})

			if p := k.pod(t, "waits"); p == nil || p.Status.Phase != "Pending" {
				t.Errorf("the waiting pod: %+v", p)
			}

			k.addNetwork(t, api, startingKubeletTimeout)
			if p := k.waitRunning(t, "waits"); !strings.HasPrefix(p.Status.PodIP, "10.99.0.") {
				t.Errorf("the pod's address: %s", p.Status.PodIP)
			}

			if err := os.Remove(filepath.Join(k.engine.Dir, confFile)); err != nil {
				t.Fatal(err)
			}

			within(t, kubeletTimeout, "the node is not ready again", notReady)
			k.addNetwork(t, api, kubeletTimeout)
			for _, name := range []string{"host", "waits"} {
				if c := k.waitRunning(t, name).container("main"); c.RestartCount != 0 {
					t.Errorf("%s was restarted: %+v", name, c)
				}
			}
		})
	}
}

// confFile is the path of the network configuration below the engine's directory.
const confFile = "root/etc/cni/net.d/10-test.conflist"

// addNetwork writes the configuration and waits until the daemon's status and then the kubelet's
// node are ready.
func (k *kubelet) addNetwork(t *testing.T, api *apiServer, timeout time.Duration) {
	t.Helper()
	file := filepath.Join(k.engine.Dir, confFile)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}

	begin := time.Now()
	if err := os.WriteFile(file, []byte(netConf), 0o644); err != nil {
		t.Fatal(err)
	}

	within(t, daemonTimeout, "the daemon reports a ready network", func() error {
		return k.networkReady(t.Context())
	})
	daemon := time.Since(begin)
	within(t, timeout-daemon, "the node is ready", func() error {
		if c := api.nodeReady(); c["status"] != "True" {
			return fmt.Errorf("%v", c)
		}
		return nil
	})

	t.Logf("ready: the daemon after %v, the node after %v", daemon, time.Since(begin))
}

// networkReady returns nil if the daemon reports a ready network.
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
