package conformance

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/answers"
	"cri-dockerd/test/engines"
)

// TestDereferences: the checks of test/answers have every message that the kubelet's code uses
// without a check.
func TestDereferences(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(engines.KubeletRead(t), "-dereferences").Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	found := strings.Fields(string(out))
	// as many as were there when this was written, so that the search cannot come to nothing
	if len(found) < 2*8 {
		t.Fatalf("found only %q", found)
	}

	for i := 0; i < len(found); i += 2 {
		if !answers.Required(protoreflect.FullName(found[i]), protoreflect.Name(found[i+1])) {
			t.Errorf("the kubelet crashes if %s has no %s, and test/answers does not check it", found[i], found[i+1])
		}
	}
}

// kubeletReader reads a daemon with the kubelet's own code until it is ended.
type kubeletReader struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	result bytes.Buffer
	errors bytes.Buffer
}

// readResult is what the reader prints.
type readResult struct {
	Rounds, Pods, Events int
	Errors               map[string]int
}

func (n *node) readAsKubelet(t *testing.T) *kubeletReader {
	t.Helper()
	r := &kubeletReader{cmd: exec.Command(engines.KubeletRead(t), "unix://"+n.Socket)}
	r.cmd.Stdout, r.cmd.Stderr = &r.result, &r.errors
	stdin, err := r.cmd.StdinPipe()
	if err == nil {
		err = r.cmd.Start()
	}

	if err != nil {
		t.Fatal(err)
	}

	r.stdin = stdin
	t.Cleanup(func() { _ = r.cmd.Process.Kill() })

	return r
}

// end ends the reader after its round and fails if it has crashed.
func (r *kubeletReader) end(t *testing.T) (out readResult) {
	t.Helper()
	ended := make(chan error, 1)
	_ = r.stdin.Close() // what has crashed has no input any more
	go func() { ended <- r.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatalf("the kubelet's code crashed: %v\n%s", err, r.errors.String())
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("the reader has not ended within two minutes")
	}

	if err := json.Unmarshal(r.result.Bytes(), &out); err != nil {
		t.Fatalf("%v: %s", err, r.result.String())
	}

	return out
}

// TestKubeletReads: the kubelet's own code reads all answers while pods and containers are in every
// phase, and never crashes. At rest it gets no error either.
func TestKubeletReads(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		r := n.readAsKubelet(t)
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupRoot() + "/pod" + cfg.Metadata.Uid
		pod := n.runPod(t, cfg)
		for name, command := range map[string][]string{
			"runs": sh("sleep 1000"), "done": sh("exit 0"), "failed": sh("exit 3"), "gone": sh("sleep 1000"),
		} {
			id := n.startConfig(t, pod, cfg, n.kubeletContainer(cfg, name, command))
			if name == "gone" {
				n.docker(t, "kill", id)
				n.waitExited(t, id)
			}
		}

		n.create(t, pod, cfg, n.kubeletContainer(cfg, "created", sh("sleep 1000")))
		broken := n.create(t, pod, cfg, n.kubeletContainer(cfg, "broken", []string{"/no/such/program"}))
		if _, err := n.Runtime.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: broken}); err == nil {
			t.Error("a program that does not exist was started")
		}

		n.hostPod(t)
		n.podWithoutInterface(t)
		n.podWithoutPause(t)
		for range 3 {
			n.lifeOfPod(t)
		}

		out := r.end(t)
		t.Logf("while pods came and went: %+v", out)
		if out.Rounds < 3 || out.Pods < 3 || out.Events == 0 {
			t.Errorf("little was read: %+v", out)
		}

		r = n.readAsKubelet(t) // at rest
		time.Sleep(time.Second)
		if out := r.end(t); out.Rounds == 0 || len(out.Errors) > 0 {
			t.Errorf("at rest: %+v", out)
		}
	})
}

// kubeletContainer is a container with the labels by which a kubelet finds its pod.
func (n *node) kubeletContainer(
	cfg *runtimeapi.PodSandboxConfig, name string, command []string,
) *runtimeapi.ContainerConfig {
	cc := n.containerConfig(command)
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	cc.Labels = map[string]string{
		"io.kubernetes.container.name": name,
		"io.kubernetes.pod.name":       cfg.Metadata.Name,
		"io.kubernetes.pod.namespace":  cfg.Metadata.Namespace,
		"io.kubernetes.pod.uid":        cfg.Metadata.Uid,
	}

	return cc
}

// hostPod runs a pod on the node's network.
func (n *node) hostPod(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	cfg.Hostname = ""
	cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	cc := n.kubeletContainer(cfg, "main", sh("sleep 1000"))
	cc.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	n.startConfig(t, n.runPod(t, cfg), cfg, cc)
}

// podWithoutInterface runs a pod that has lost its interface, as while a network plugin tears it
// down.
func (n *node) podWithoutInterface(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	id := n.startConfig(t, pod, cfg, n.kubeletContainer(cfg, "main", sh("sleep 1000")))
	n.run(t, "nsenter", "-t", n.inspect(t, id, ".State.Pid"), "-n", "ip", "link", "del", "eth0")
	s := n.podStats(t, pod)
	if s.Network != nil || s.Cpu == nil || len(s.Containers) != 1 {
		t.Errorf("stats of a pod without its interface: %v", s)
	}
}

// podWithoutPause runs a pod whose pause has ended.
func (n *node) podWithoutPause(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	n.startConfig(t, pod, cfg, n.kubeletContainer(cfg, "main", sh("sleep 1000")))
	n.docker(t, "kill", pod)
	eventually(t, "the pause has ended", func() bool {
		return n.podStatus(t, pod).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
}

// lifeOfPod runs a pod with a container, and stops and removes it.
func (n *node) lifeOfPod(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	n.startConfig(t, pod, cfg, n.kubeletContainer(cfg, "main", sh("sleep 1000")))
	n.stopPod(t, pod)
	n.removePod(t, pod)
}
