package cluster

import (
	"bufio"
	"fmt"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
)

// protocols has the environment of kubectl for each protocol of streams.
var protocols = map[string]string{
	"WebSocket": "export KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true KUBECTL_PORT_FORWARD_WEBSOCKETS=true\n",
	"SPDY":      "export KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false KUBECTL_PORT_FORWARD_WEBSOCKETS=false\n",
}

// streams runs kubectl with one protocol for streams.
type streams struct {
	*cluster
	protocol string
}

// testStreams uses the streams of all pods with each protocol.
func (c *cluster) testStreams(t *testing.T, pods []string) {
	for protocol := range protocols {
		s := streams{c, protocol}
		t.Run(protocol, func(t *testing.T) {
			t.Run("protocol", s.testProtocol)
			for _, p := range pods {
				s.testExec(t, p)
				s.testCopy(t, p)
			}

			t.Run("attach", s.testAttach)
			t.Run("port-forward", func(t *testing.T) { s.testPortForward(t, pods) })
			t.Run("debug", func(t *testing.T) { s.testDebug(t, pods[len(pods)-1]) })
		})
	}

	t.Run("logs", func(t *testing.T) { c.testLogs(t, pods) })
}

// sh runs a script with kubectl. $1 is a pod.
func (s streams) sh(t *testing.T, pod, script string) string {
	t.Helper()
	return s.nodes[0].Run(t, "sh", "-ec", "export KUBECONFIG=/etc/kubernetes/admin.conf\n"+protocols[s.protocol]+script,
		"sh", pod)
}

// testProtocol checks the protocol that kubectl requests.
func (s streams) testProtocol(t *testing.T) {
	out := s.sh(t, "", "kubectl exec daemonset/each -v=8 -- true 2>&1")
	if got := strings.Contains(out, "SPDY/3.1"); got != (s.protocol == "SPDY") {
		t.Errorf("requests:\n%s", out)
	}
}

// testExec uses exec with data on standard input, an exit code and a terminal.
func (s streams) testExec(t *testing.T, pod string) {
	if got := s.sh(t, pod, `head -c 10485760 /dev/zero | kubectl exec -i "$1" -- cat | wc -c`); got != "10485760\n" {
		t.Errorf("exec in %s: got %q of 10485760 bytes", pod, got)
	}
	if got := s.sh(t, pod, `kubectl exec "$1" -- sh -c "exit 7" 2>/dev/null || echo $?`); got != "7\n" {
		t.Errorf("exit code of exec in %s: %q", pod, got)
	}

	got := s.sh(t, pod, `script -qec "kubectl exec -it $1 -- sh -c 'test -t 0 && echo terminal'" /dev/null`)
	if !strings.HasSuffix(got, "terminal\r\n") {
		t.Errorf("exec with a terminal in %s: got %q", pod, got)
	}
}

// testCopy copies a file into a pod and back.
func (s streams) testCopy(t *testing.T, pod string) {
	got := s.sh(t, pod, `head -c 3000000 /dev/urandom > /tmp/f
		kubectl cp /tmp/f "$1":/tmp/f && kubectl cp "$1":/tmp/f /tmp/g 2>/dev/null
		cmp /tmp/f /tmp/g && echo same`)
	if !strings.HasSuffix(got, "same\n") {
		t.Errorf("cp to and from %s: %q", pod, got)
	}
}

// testAttach runs a pod attached to the standard input and output of kubectl.
func (s streams) testAttach(t *testing.T) {
	name := "attached-" + strings.ToLower(s.protocol)
	got := s.sh(t, name, `echo 'echo answer $((6 * 7))' | kubectl run "$1" --rm -i --quiet --restart=Never `+
		`--image=`+engines.Busybox+` --image-pull-policy=Never -- sh`)
	if !strings.Contains(got, "answer 42") {
		t.Errorf("attach: got %q", got)
	}
}

// testPortForward uses port-forward to each pod.
func (s streams) testPortForward(t *testing.T, pods []string) {
	for i, p := range pods {
		port := fmt.Sprint(18080 + i)
		cmd := s.nodes[0].Command("sh", "-ec", protocols[s.protocol]+`exec kubectl "$@"`, "sh",
			kubeconfig, "port-forward", "pod/"+p, port+":8080")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		node := s.kubectl(t, "get", "pod", p, "-o", "jsonpath={.spec.nodeName}")
		s.nodes[0].Await(t, timeout, "port-forward to "+p, func() bool {
			got, err := s.nodes[0].Try("busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:"+port+"/")
			return err == nil && got == node+"\n"
		})
	}
}

// testDebug lists the processes of a container from an attached ephemeral container.
func (s streams) testDebug(t *testing.T, pod string) {
	name := "debugger-" + strings.ToLower(s.protocol)
	got := s.sh(t, pod, `echo 'ps; exit' | kubectl debug "$1" -i --image=`+engines.Busybox+
		` --image-pull-policy=Never --container=`+name+` --target=each -- sh`)
	if !strings.Contains(got, "httpd -f -p 8080") {
		t.Errorf("output of the ephemeral container: got %q", got)
	}
}

// testLogs reads and follows the logs of the pods.
func (c *cluster) testLogs(t *testing.T, pods []string) {
	for _, p := range pods {
		if got := c.kubectl(t, "logs", p); !strings.HasPrefix(got, "serving on node") {
			t.Errorf("logs of %s: %q", p, got)
		}

		if got := c.followLog(t, p); !strings.HasPrefix(got, "20") || !strings.Contains(got, "Z serving on node") {
			t.Errorf("followed logs of %s: %q", p, got)
		}

		if out, err := c.nodes[0].Try("kubectl", kubeconfig, "logs", "--previous", p); err == nil ||
			!strings.Contains(err.Error(), "not found") {
			t.Errorf("logs of the previous container of %s: %q, %v", p, out, err)
		}
	}
}

// followLog follows the log of a pod and returns its first line.
func (c *cluster) followLog(t *testing.T, pod string) string {
	t.Helper()
	cmd := c.nodes[0].Command("timeout", "60", "kubectl", kubeconfig, "logs", "--follow", "--timestamps", pod)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}

	if err != nil {
		t.Fatal(err)
	}

	line, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Errorf("follow the log of %s: %v", pod, err)
	}

	return line
}
