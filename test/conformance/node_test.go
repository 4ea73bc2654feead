// Package conformance tests the daemon through its CRI socket, like a kubelet, on private engines
// of every version. It has no code outside of its tests.
package conformance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// node is a runtime under test: an engine with a daemon or, with -endpoint, the server of that
// socket.
type node struct {
	*engines.Daemon
	eng       *engines.Engine // nil with -endpoint of another runtime than Docker
	image     string          // with a shell
	groups    string          // parent cgroup of all pods
	slices    bool            // the cgroup driver is systemd
	unrelated []string        // files at the start of the tests, of the node's other pods
}

// own returns the engine, for tests that inspect it directly.
func (n *node) own(t *testing.T) *engines.Engine {
	t.Helper()
	if n.eng == nil {
		t.Skip("needs Docker")
	}
	return n.eng
}

// private returns the engine, for tests that stop or reconfigure it or its daemon.
func (n *node) private(t *testing.T) *engines.Engine {
	t.Helper()
	if n.own(t).Attached() {
		t.Skip(needsPrivate)
	}
	return n.eng
}

const needsPrivate = "stops or reconfigures an engine or a daemon; not with -endpoint"

// needsProgram skips the test on a node with another runtime, or with a daemon outside of PATH.
func (n *node) needsProgram(t *testing.T) {
	t.Helper()
	if n.own(t); n.Program == "" {
		t.Skip("needs cri-dockerd in PATH")
	}
}

// ownedBySystemd returns the runtime at -endpoint. It skips the test unless systemd owns the
// control groups of its containers (cgroup v2).
func ownedBySystemd(t *testing.T) *node {
	t.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		t.Skip("needs cgroup v2")
	}
	return nodeOfSystemd(t)
}

// nodeOfSystemd returns the node of -endpoint, whose systemd and engine own the control groups.
func nodeOfSystemd(t *testing.T) *node {
	t.Helper()
	if *endpoint == "" {
		t.Skip("needs the systemd of a machine; set -endpoint")
	}

	n := endpointNode()
	if n.own(t); !n.slices {
		t.Skip("needs Docker's systemd cgroup driver")
	}

	return n
}

// needsShim skips the test if a pod runs without the shim on a node with systemd's cgroup driver.
// fault is that of runc.
func (n *node) needsShim(t *testing.T, pod, fault string) {
	t.Helper()
	if n.slices && !n.usesShim(t, pod) {
		t.Skip(fault)
	}
}

// needsUnit skips the test if a unit of systemd is not active.
func (n *node) needsUnit(t *testing.T, unit string) {
	t.Helper()
	if n.own(t).Command("systemctl", "--quiet", "is-active", unit).Run() != nil {
		t.Skip("needs an active " + unit)
	}
}

// needsPressure skips the test if the kernel has no pressure (PSI) of control groups.
func needsPressure(t *testing.T) {
	t.Helper()
	for _, file := range []string{"/sys/fs/cgroup/cgroup.controllers", "/proc/pressure/cpu"} {
		if _, err := os.Stat(file); err != nil {
			t.Skip("needs cgroup v2 with pressure stall information: " + err.Error())
		}
	}
}

// eventually waits until cond holds and fails the test after 20 seconds, or more on a slow machine.
func eventually(t *testing.T, condition string, cond func() bool) {
	t.Helper()
	if !within(20*time.Second, cond) {
		t.Fatalf("timed out after %s waiting for: %s", scaled(20*time.Second), condition)
	}
}

// within reports whether cond holds before d has passed, or more on a slow machine.
func within(d time.Duration, cond func() bool) bool { return engines.Within(scaled(d), cond) }

// scaled returns a duration on a usual machine, longer on a slow one.
func scaled(d time.Duration) time.Duration { return time.Duration(slowness() * float64(d)) }

// slowness is the factor by which this machine is slower than a usual one, between 1 and 10. An
// emulated processor takes more than ten times as long to start a process. The fastest of several
// starts counts, because others may wait for the processor.
var slowness = sync.OnceValue(func() float64 {
	const usual = 4 * time.Millisecond // under load, with the race detector
	fastest := time.Hour
	for range 20 {
		begin := time.Now()
		if err := exec.Command("/bin/true").Run(); err != nil {
			return 1
		}
		fastest = min(fastest, time.Since(begin))
	}

	return min(max(1, float64(fastest)/float64(usual)), 10)
})

// sh returns the command line of a shell script.
func sh(script string) []string { return []string{"sh", "-c", script} }

// DialContext dials TCP inside the engine's network namespace.
func (n *node) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if n.eng == nil {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	return n.eng.DialContext(ctx, network, addr)
}

// tempDir creates a directory visible to the test process and the engine.
func (n *node) tempDir(t *testing.T) string {
	t.Helper()
	if n.eng == nil {
		return t.TempDir() // on this machine
	}

	dir, err := os.MkdirTemp(n.eng.Dir, "t")
	if err != nil {
		t.Fatal(err)
	}

	return dir
}

// run runs a command in the engine's namespaces, or on this machine.
func (n *node) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	if n.eng != nil {
		cmd = n.eng.Command(name, args...)
	}

	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// docker runs the docker command on the engine, without the daemon.
func (n *node) docker(t *testing.T, args ...string) string {
	t.Helper()
	return n.run(t, "docker", append([]string{"-H", "unix://" + n.own(t).Socket}, args...)...)
}

// get returns the body of a page in the engine's network namespace, or "" on any error.
func (n *node) get(addr string) string {
	c := http.Client{
		Timeout:   scaled(2 * time.Second),
		Transport: &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true},
	}

	r, err := c.Get("http://" + addr + "/")
	if err != nil {
		return ""
	}
	defer r.Body.Close()

	b, _ := io.ReadAll(r.Body)

	return string(b)
}

// cgroupParent returns the parent of a pod's containers in the form of the kubelet for the cgroup
// driver: /root/burstable/podUID, or /root.slice/root-burstable.slice/root-burstable-podUID.slice
// with underscores in place of dashes.
func (n *node) cgroupParent(levels ...string) string {
	if !n.slices {
		return path.Join(append([]string{n.groups}, levels...)...)
	}

	name := strings.TrimPrefix(n.groups, "/")
	parent := "/" + name + ".slice"
	for _, l := range levels {
		name += "-" + strings.ReplaceAll(l, "-", "_")
		parent += "/" + name + ".slice"
	}

	return parent
}

// containerGroup returns the cgroup of a container below the parent of its pod.
func (n *node) containerGroup(cfg *runtimeapi.PodSandboxConfig, id string) string {
	if n.slices {
		return cfg.Linux.CgroupParent + "/docker-" + id + ".scope"
	}
	return cfg.Linux.CgroupParent + "/" + id
}

// podConfig returns the configuration of a small pod with a unique name.
func (n *node) podConfig(t *testing.T) *runtimeapi.PodSandboxConfig {
	t.Helper()
	b := make([]byte, 6)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}

	id := hex.EncodeToString(b)

	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "pod-" + id, Uid: "uid-" + id, Namespace: "default"},
		Hostname:     "pod-" + id,
		LogDirectory: filepath.Join(n.tempDir(t), "default_pod-"+id+"_uid-"+id),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: n.cgroupParent("pod" + id),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// containerConfig returns the configuration of a container of the shell image.
func (n *node) containerConfig(command []string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
		Image:    &runtimeapi.ImageSpec{Image: n.image},
		Command:  command,
		LogPath:  "main_0.log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

// runPod runs a pod and removes it at the end of the test.
func (n *node) runPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	r, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}

	t.Cleanup(func() {
		_, err := n.Runtime.RemovePodSandbox(context.Background(),
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
		if err != nil {
			t.Errorf("RemovePodSandbox: %v", err)
		}
	})

	return r.PodSandboxId
}

func (n *node) stopPod(t *testing.T, id string) {
	t.Helper()
	if _, err := n.Runtime.StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatalf("StopPodSandbox: %v", err)
	}
}

func (n *node) removePod(t *testing.T, id string) {
	t.Helper()
	if _, err := n.Runtime.RemovePodSandbox(t.Context(),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatalf("RemovePodSandbox: %v", err)
	}
}

func (n *node) podStatus(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	r, err := n.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatalf("PodSandboxStatus: %v", err)
	}
	return r.Status
}

func (n *node) create(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, cc *runtimeapi.ContainerConfig,
) string {
	t.Helper()
	r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod,
		Config:        cc,
		SandboxConfig: cfg,
	})
	if err != nil {
		t.Fatalf("CreateContainer: %v", err)
	}

	return r.ContainerId
}

func (n *node) startID(t *testing.T, id string) {
	t.Helper()
	if _, err := n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}
}

// startConfig creates and starts a container.
func (n *node) startConfig(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, cc *runtimeapi.ContainerConfig,
) string {
	t.Helper()
	id := n.create(t, pod, cfg, cc)
	n.startID(t, id)
	return id
}

// start creates and starts a container of the shell image.
func (n *node) start(t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, command []string) string {
	t.Helper()
	return n.startConfig(t, pod, cfg, n.containerConfig(command))
}

// startNamed creates and starts a container with a name.
func (n *node) startNamed(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string, command []string,
) string {
	t.Helper()
	cc := n.containerConfig(command)
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	return n.startConfig(t, pod, cfg, cc)
}

func (n *node) containerStatus(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := n.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatalf("ContainerStatus: %v", err)
	}
	return r.Status
}

// waitExited waits until a container has exited and returns its status.
func (n *node) waitExited(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	var s *runtimeapi.ContainerStatus
	eventually(t, "exit of the container", func() bool {
		s = n.containerStatus(t, id)
		return s.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return s
}

// exec runs a command in a container and returns its output. The command must succeed.
func (n *node) exec(t *testing.T, id string, cmd ...string) string {
	t.Helper()
	r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: 20})
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("ExecSync %q: %v, %v", cmd, r, err)
	}
	return string(r.Stdout)
}

// log returns the output of a container from its log: Docker's JSON, or the CRI's lines of time,
// stream, tag and text.
func (n *node) log(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	var text strings.Builder
	if !bytes.HasPrefix(b, []byte("{")) {
		for line := range strings.Lines(string(b)) {
			if f := strings.SplitN(line, " ", 4); len(f) == 4 {
				text.WriteString(f[3])
			}
		}
		return text.String()
	}

	for d := json.NewDecoder(bytes.NewReader(b)); ; {
		var line struct{ Log string }
		if err := d.Decode(&line); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return text.String()
		} else if err != nil {
			t.Fatal(err)
		}
		text.WriteString(line.Log)
	}
}

// leftovers returns the remaining objects and files of a pod on the engine and the node, or "" if
// there are none.
func (n *node) leftovers(t *testing.T, cfg *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	var remaining []string
	n.own(t)
	if out := strings.TrimSpace(n.docker(t, "ps", "-aq", "--filter", "name="+cfg.Metadata.Uid)); out != "" {
		remaining = append(remaining, "containers "+out)
	}

	r, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}

	known := map[string]bool{}
	for _, p := range r.Items {
		known[p.Id] = true
		if p.Metadata.Uid == cfg.Metadata.Uid {
			remaining = append(remaining, "sandbox "+p.Id)
		}
	}

	for f, text := range n.networkFiles() {
		if !slices.Contains(n.unrelated, f) &&
			(strings.Contains(text, cfg.Metadata.Uid) || hasUnknownID(filepath.Base(f)+" "+text, known)) {
			remaining = append(remaining, f)
		}
	}

	return strings.Join(append(remaining, n.unknownPins()...), "; ")
}

// networkFiles returns the content of the files about the networks of all pods, by path.
func (n *node) networkFiles() map[string]string {
	content := map[string]string{}
	for _, dir := range []string{n.PinDir, n.CacheDir, n.PendingDir, filepath.Join(n.LeaseDir, "*")} {
		files, _ := filepath.Glob(filepath.Join(dir, "*")) // the pattern is valid
		for _, f := range files {
			b, _ := os.ReadFile(f)
			content[f] = string(b)
		}
	}

	return content
}

// unknownPins returns pinned network namespaces without a record of the daemon.
func (n *node) unknownPins() (lost []string) {
	known := map[string]bool{}
	pins, _ := filepath.Glob(n.eng.Path("/run/netns/cni-*"))
	links, _ := filepath.Glob(filepath.Join(n.PinDir, "*"))
	for _, l := range links {
		target, _ := os.Readlink(l)
		known[filepath.Base(target)] = true
	}

	for _, p := range pins {
		if !known[filepath.Base(p)] && !slices.Contains(n.unrelated, p) {
			lost = append(lost, p)
		}
	}

	return lost
}

// readyPod returns the ID of the pod's sandbox if it is ready and has its address, else "".
func (n *node) readyPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	r, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, p := range r.Items {
		if p.Metadata.Uid != cfg.Metadata.Uid || p.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		if s, err := n.Runtime.PodSandboxStatus(t.Context(),
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.Id}); err == nil && s.Status.Network.GetIp() != "" {
			return p.Id
		}
	}

	return ""
}

// hasUnknownID reports whether the text contains an unknown container ID of 64 hex digits.
func hasUnknownID(text string, known map[string]bool) bool {
	for _, f := range strings.FieldsFunc(text, func(r rune) bool {
		return !strings.ContainsRune("0123456789abcdef", r)
	}) {
		if len(f) == 64 && !known[f] {
			return true
		}
	}

	return false
}

// assertNoLeftovers fails if objects or files of a pod remain on the engine or the node.
func (n *node) assertNoLeftovers(t *testing.T, cfg *runtimeapi.PodSandboxConfig) {
	t.Helper()
	if n.eng == nil { // the places are Docker's and the daemon's
		return
	}

	// New pods of other tests can already hold a network and not be listed yet.
	var l string
	if !within(5*time.Second, func() bool { l = n.leftovers(t, cfg); return l == "" }) {
		t.Errorf("remaining state of the pod: %s", l)
	}
}
