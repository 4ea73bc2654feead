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

// TestDereferences checks that test/answers covers every message that the kubelet's code
// dereferences without a nil check.
func TestDereferences(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(engines.KubeletRead(t), "-dereferences").Output()
	if err != nil {
		t.Fatalf("search for dereferences: %v\n%s", err, out)
	}

	found := strings.Fields(string(out))
	// The number at the time of writing; it guards against a search without results.
	if len(found) < 2*8 {
		t.Fatalf("found only %q, want at least 8 pairs", found)
	}

	for i := 0; i < len(found); i += 2 {
		if !answers.Required(protoreflect.FullName(found[i]), protoreflect.Name(found[i+1])) {
			t.Errorf("the kubelet crashes on a missing %s.%s, and test/answers does not check it", found[i], found[i+1])
		}
	}
}

// kubeletReader reads a daemon with the kubelet's own code until it is stopped.
type kubeletReader struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	result bytes.Buffer
	errors bytes.Buffer
}

// readResult is the output of the reader.
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

// end stops the reader after its current round and fails if it has crashed.
func (r *kubeletReader) end(t *testing.T) (out readResult) {
	t.Helper()
	ended := make(chan error, 1)
	_ = r.stdin.Close() // fails after a crash
	go func() { ended <- r.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatalf("the kubelet's code crashed: %v\n%s", err, r.errors.String())
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("the reader did not stop within two minutes")
	}

	if err := json.Unmarshal(r.result.Bytes(), &out); err != nil {
		t.Fatalf("result of the reader: %v: %s", err, r.result.String())
	}

	return out
}

// TestKubeletReads reads all responses with the kubelet's own code while pods and containers are in
// every phase. The code never crashes. At rest it gets no error either.
func TestKubeletReads(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		r := n.readAsKubelet(t)
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("pod" + cfg.Metadata.Uid)
		pod := n.runPod(t, cfg)
		for name, command := range map[string][]string{
			"running":   sh("sleep 1000"),
			"completed": sh("exit 0"),
			"failed":    sh("exit 3"),
			"killed":    sh("sleep 1000"),
		} {
			id := n.startConfig(t, pod, cfg, n.kubeletContainerConfig(cfg, name, command))
			if name == "killed" {
				n.docker(t, "kill", id)
				n.waitExited(t, id)
			}
		}

		n.create(t, pod, cfg, n.kubeletContainerConfig(cfg, "created", sh("sleep 1000")))
		broken := n.create(t, pod, cfg, n.kubeletContainerConfig(cfg, "broken", []string{"/no/such/program"}))
		if _, err := n.Runtime.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: broken}); err == nil {
			t.Error("StartContainer of a missing program succeeded")
		}

		n.runHostPod(t)
		n.runPodWithoutInterface(t)
		n.runPodWithoutPause(t)
		for range 3 {
			n.runAndRemovePod(t)
		}

		out := r.end(t)
		t.Logf("while pods were created and removed: %+v", out)
		if out.Rounds < 3 || out.Pods < 3 || out.Events == 0 {
			t.Errorf("too few responses were read: %+v", out)
		}

		r = n.readAsKubelet(t) // at rest
		time.Sleep(time.Second)
		if out := r.end(t); out.Rounds == 0 || len(out.Errors) > 0 {
			t.Errorf("result of the reader at rest: %+v", out)
		}
	})
}

// kubeletContainerConfig returns a container configuration with the labels by which a kubelet finds
// the pod.
func (n *node) kubeletContainerConfig(
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

// runHostPod runs a pod on the node's network.
func (n *node) runHostPod(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	cfg.Hostname = ""
	cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	cc := n.kubeletContainerConfig(cfg, "main", sh("sleep 1000"))
	cc.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	n.startConfig(t, n.runPod(t, cfg), cfg, cc)
}

// runPodWithoutInterface runs a pod and removes its interface, as a network plugin does during
// teardown.
func (n *node) runPodWithoutInterface(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	id := n.startConfig(t, pod, cfg, n.kubeletContainerConfig(cfg, "main", sh("sleep 1000")))
	n.run(t, "nsenter", "-t", n.inspect(t, id, ".State.Pid"), "-n", "ip", "link", "del", "eth0")
	s := n.podStats(t, pod)
	if s.Network != nil || s.Cpu == nil || len(s.Containers) != 1 {
		t.Errorf("stats of a pod without its interface: %v", s)
	}
}

// runPodWithoutPause runs a pod and kills its pause.
func (n *node) runPodWithoutPause(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	n.startConfig(t, pod, cfg, n.kubeletContainerConfig(cfg, "main", sh("sleep 1000")))
	n.docker(t, "kill", pod)
	eventually(t, "exit of the pause", func() bool {
		return n.podStatus(t, pod).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
}

// runAndRemovePod runs, stops and removes a pod with a container.
func (n *node) runAndRemovePod(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	n.startConfig(t, pod, cfg, n.kubeletContainerConfig(cfg, "main", sh("sleep 1000")))
	n.stopPod(t, pod)
	n.removePod(t, pod)
}
