package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
)

const networkPod = `apiVersion: v1
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

// TestKubeletWaitsForTheNetwork is a node without a CNI configuration: it is not ready, for a reason that says what to do, and pods on the
// host network run meanwhile. When the file appears, it becomes ready at once, and the pod that has waited starts.
func TestKubeletWaitsForTheNetwork(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v)
			conf := filepath.Join(k.engine.Dir, "net.d")
			k.daemon.Change(t, "--network-plugin=cni", "--cni-conf-dir="+conf, "--cni-bin-dir="+engines.Plugins(), "--pod-cidr=")
			k.daemon.AwaitReady(t)
			l := k.engine.Listen(t, "127.0.0.1:0")
			api := serveAPI(t, l, map[string][]object{"/api/v1/nodes": {node(object{"type": "Ready", "status": "False"})}})
			k.run(t, k.config+"contentType: application/json\nnodeStatusUpdateFrequency: 1s\n", "--kubeconfig="+k.kubeconfig(t, l.Addr()))
			for name, host := range map[string]string{"host": "true", "waiting": "false"} {
				k.apply(t, name, strings.NewReplacer("NAME", name, "HOST", host).Replace(networkPod))
			}
			eventually(t, "the pod on the host network runs", func() error {
				if p := k.pod(t, "host"); p == nil || p.container("main").State.Running == nil {
					return fmt.Errorf("%+v", p)
				}
				return nil
			})
			want := "no CNI configuration in " + conf + ": install a network add-on such as flannel; pods on the host network run meanwhile"
			eventually(t, "the node is not ready for our reason", func() error {
				if c := api.condition("Ready"); c["status"] != "False" || !strings.Contains(fmt.Sprint(c["message"]), want) {
					return fmt.Errorf("condition %v", c)
				}
				return nil
			})
			if p := k.pod(t, "waiting"); p.Status.PodIP != "" {
				t.Errorf("a pod has address %s without a network", p.Status.PodIP)
			}
			if err := os.Mkdir(conf, 0o755); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := os.WriteFile(filepath.Join(conf, "10-test.conflist"), []byte(`{"cniVersion":"1.1.0","name":"test","plugins":[
				{"type":"bridge","bridge":"test0","isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]]}}]}`), 0o644); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the node is ready", func() error {
				if c := api.condition("Ready"); c["status"] != "True" {
					return fmt.Errorf("condition %v", c)
				}
				return nil
			})
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("the node became ready %v after the file appeared", took)
			}
			if p := k.waitRunning(t, "waiting"); !strings.HasPrefix(p.Status.PodIP, "10.77.0.") {
				t.Errorf("the pod that has waited got address %q", p.Status.PodIP)
			}
		})
	}
}
