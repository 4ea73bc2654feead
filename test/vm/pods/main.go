// Command pods runs pods through the socket of a node and checks what became of them after a
// restart of Docker or of the node.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

const (
	endpoint = "unix:///run/cri-dockerd.sock"
	docker   = "/run/docker.sock"
	image    = "busybox:latest"
	logs     = "/var/log/pods"
	timeout  = 10 * time.Minute // of a whole command
	// The daemon releases the networks of ended pods after it has connected to the engine. A slow
	// machine takes half a minute for the DEL of a network chain.
	releaseTimeout = 3 * time.Minute
	// systemd replaces some limits at a reload, and the daemon restores them.
	limitTimeout = 20 * time.Second

	usage = `usage: pods image, or pods COMMAND FILE
  image    creates the image of the pods
  start    runs pods and records them in the file
  running  all recorded pods run as before, with their addresses and limits, and write their logs
  ended    all recorded containers have ended, and their networks are released
  again    runs the recorded pods again, as a kubelet does after a restart of the node
  remove   removes the recorded pods and checks that nothing remains
`
)

// count is the number of pods.
const count = 3

// unified are limits beyond Docker's API (cgroups(7), files of cgroup v2).
var unified = map[string]string{
	"memory.high":      "50331648",
	"memory.low":       "8388608",
	"memory.min":       "4194304",
	"memory.oom.group": "1",
	"pids.max":         "1000",
}

// pod is a recorded pod.
type pod struct {
	Config    *runtimeapi.PodSandboxConfig
	Sandbox   string
	Container string
	Address   string
	StartedAt int64    // of the container, in nanoseconds
	Earlier   []string // sandboxes of this pod that have ended
}

// node is the node under test and its recorded pods.
type node struct {
	*engines.Daemon
	ctx  context.Context
	pods []*pod
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "image" {
		createImage()
		return
	}

	commands := map[string]func(*node) error{
		"start":   (*node).start,
		"running": (*node).running,
		"ended":   (*node).ended,
		"again":   (*node).again,
		"remove":  (*node).remove,
	}
	if len(os.Args) != 3 || commands[os.Args[1]] == nil {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}

	if err := run(commands[os.Args[1]], os.Args[2]); err != nil {
		fmt.Fprintf(os.Stderr, "pods %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

// createImage creates the image without a registry.
func createImage() {
	h := &engines.Program{}
	defer h.End()

	engines.LoadBusybox(h, docker)
	if out, err := exec.Command("docker", "tag", engines.Busybox, image).CombinedOutput(); err != nil {
		h.Fatalf("docker tag: %v\n%s", err, out)
	}
}

// run runs a command on the pods recorded in the file and records the result.
func run(command func(*node) error, file string) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()

	h := &engines.Program{}
	defer h.End()

	n := &node{Daemon: engines.Connect(h, endpoint), ctx: ctx}
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &n.pods)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}

	if err := command(n); err != nil {
		return err
	}

	if b, err = json.MarshalIndent(n.pods, "", "\t"); err != nil {
		return err
	}

	return os.WriteFile(file, b, 0o600)
}

// start runs the pods. Their containers write a line in every second.
func (n *node) start() error {
	n.pods = nil
	for i := range count {
		name := fmt.Sprint("pod", i)
		p := &pod{Config: &runtimeapi.PodSandboxConfig{
			Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "vm", Uid: "vm-" + name},
			Hostname:     name,
			LogDirectory: filepath.Join(logs, "vm_"+name+"_vm-"+name),
			Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: "kubepods-vm.slice"},
		}}
		if os.Getenv("DRIVER") == "cgroupfs" {
			p.Config.Linux.CgroupParent = "/kubepods/vm"
		}

		n.pods = append(n.pods, p)
		if err := n.runPod(p); err != nil {
			return err
		}
	}

	return n.running()
}

// runPod runs a sandbox and its container.
func (n *node) runPod(p *pod) error {
	attempt := p.Config.Metadata.Attempt
	if err := os.MkdirAll(p.Config.LogDirectory, 0o755); err != nil {
		return err
	}

	s, err := n.Runtime.RunPodSandbox(n.ctx, &runtimeapi.RunPodSandboxRequest{Config: p.Config})
	if err != nil {
		return err
	}

	p.Sandbox = s.PodSandboxId
	c, err := n.Runtime.CreateContainer(n.ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  p.Sandbox,
		SandboxConfig: p.Config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: attempt},
			Image:    &runtimeapi.ImageSpec{Image: image},
			LogPath:  fmt.Sprintf("main_%d.log", attempt),
			Command: []string{"sh", "-c",
				"trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 1; done"},
			Linux: &runtimeapi.LinuxContainerConfig{Resources: resources()},
		},
	})
	if err != nil {
		return err
	}

	p.Container = c.ContainerId
	if _, err := n.Runtime.StartContainer(n.ctx,
		&runtimeapi.StartContainerRequest{ContainerId: p.Container}); err != nil {
		return err
	}

	sandbox, container, err := n.status(p)
	if err == nil {
		p.Address, p.StartedAt = sandbox.Network.GetIp(), container.StartedAt
	}

	return err
}

// resources returns the limits of a container.
func resources() *runtimeapi.LinuxContainerResources {
	r := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 102}
	if isUnified() {
		r.Unified = unified
	}
	return r
}

// isUnified reports whether the node has cgroup v2 (cgroups(7)).
func isUnified() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// limited checks the limits of a pod's container in its control group, and in its status.
func (n *node) limited(p *pod, c *runtimeapi.ContainerStatus) error {
	want := map[string]string{"memory/memory.limit_in_bytes": "67108864", "cpu/cpu.shares": "102"}
	if isUnified() {
		want = maps.Clone(unified)
		want["memory.max"], want["memory.swap.max"] = "67108864", "0"
	}

	var errs []error
	for _, file := range slices.Sorted(maps.Keys(want)) {
		var got string
		if !engines.Within(limitTimeout, func() bool {
			got = n.exec(p, "cat", "/sys/fs/cgroup/"+file)
			return got == want[file]
		}) {
			errs = append(errs, fmt.Errorf("%s is %q, want %s", file, got, want[file]))
		}
	}

	for file, value := range c.GetResources().GetLinux().GetUnified() {
		if value != want[file] {
			errs = append(errs, fmt.Errorf("the status has %s of %q, want %s", file, value, want[file]))
		}
	}

	return errors.Join(errs...)
}

// exec returns the output of a command in a pod's container, or the error.
func (n *node) exec(p *pod, command ...string) string {
	r, err := n.Runtime.ExecSync(n.ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: p.Container,
		Cmd:         command,
		Timeout:     60,
	})
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(r.Stdout) + string(r.Stderr))
}

// status returns the states of a pod.
func (n *node) status(p *pod) (*runtimeapi.PodSandboxStatus, *runtimeapi.ContainerStatus, error) {
	s, err := n.Runtime.PodSandboxStatus(n.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.Sandbox})
	if err != nil {
		return nil, nil, err
	}

	c, err := n.Runtime.ContainerStatus(n.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: p.Container})
	if err != nil {
		return nil, nil, err
	}

	return s.Status, c.Status, nil
}

// logSize returns the size of the current log of a pod.
func (p *pod) logSize() int64 {
	info, err := os.Stat(filepath.Join(p.Config.LogDirectory, fmt.Sprintf("main_%d.log", p.Config.Metadata.Attempt)))
	if err != nil {
		return 0
	}

	return info.Size()
}

// forEach calls check for every pod and joins the errors.
func (n *node) forEach(check func(*pod) error) error {
	var errs []error
	for _, p := range n.pods {
		if err := check(p); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.Config.Metadata.Name, err))
		}
	}

	return errors.Join(errs...)
}

// running checks that every pod runs since its start.
func (n *node) running() error {
	return n.forEach(func(p *pod) error {
		s, c, err := n.status(p)
		if err != nil {
			return err
		}

		var errs []error
		if ip := s.Network.GetIp(); s.State != runtimeapi.PodSandboxState_SANDBOX_READY || ip == "" || ip != p.Address {
			errs = append(errs, fmt.Errorf("%v, address %q, want ready with %q", s.State, ip, p.Address))
		}
		if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING || c.StartedAt != p.StartedAt {
			errs = append(errs, fmt.Errorf("container %v since %d, want running since %d", c.State, c.StartedAt,
				p.StartedAt))
		}

		if got := n.exec(p, "ip", "-4", "addr", "show", "eth0"); !strings.Contains(got, " "+p.Address+"/") {
			errs = append(errs, fmt.Errorf("address in the pod: %s, want %s", got, p.Address))
		}

		errs = append(errs, n.limited(p, c))

		if size := p.logSize(); !engines.Within(20*time.Second, func() bool { return p.logSize() > size }) {
			errs = append(errs, fmt.Errorf("the log does not grow beyond %d bytes", size))
		}

		return errors.Join(errs...)
	})
}

// ended checks that every pod has ended, that its status has the time and the reason, and that its
// network is released.
func (n *node) ended() error {
	return n.forEach(func(p *pod) error {
		engines.Within(releaseTimeout, func() bool {
			s, _, err := n.status(p)
			return err == nil && s.Network.GetIp() == ""
		})

		s, c, err := n.status(p)
		if err != nil {
			return err
		}

		var errs []error
		if s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || s.Network.GetIp() != "" {
			errs = append(errs, fmt.Errorf("%v, address %q, want not ready", s.State, s.Network.GetIp()))
		}
		if c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.FinishedAt < c.StartedAt || c.Reason == "" ||
			c.Reason == "OOMKilled" {
			errs = append(errs, fmt.Errorf("container %v", c))
		}
		if p.logSize() == 0 {
			errs = append(errs, errors.New("no log"))
		}

		return errors.Join(errs...)
	})
}

// again runs every pod with the next attempt. The earlier ones remain.
func (n *node) again() error {
	for _, p := range n.pods {
		p.Earlier = append(p.Earlier, p.Sandbox)
		p.Config.Metadata.Attempt++
		if err := n.runPod(p); err != nil {
			return err
		}
	}

	return n.running()
}

// remove removes the pods with their earlier sandboxes.
func (n *node) remove() error {
	for _, p := range n.pods {
		for _, id := range append(p.Earlier, p.Sandbox) {
			if _, err := n.Runtime.StopPodSandbox(n.ctx,
				&runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
				return err
			}

			if _, err := n.Runtime.RemovePodSandbox(n.ctx,
				&runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
				return err
			}
		}
	}

	var remaining string
	if !engines.Within(time.Minute, func() bool { remaining = n.remaining(); return remaining == "" }) {
		return fmt.Errorf("remaining after the removal: %s", remaining)
	}

	n.pods = nil

	return nil
}

// remaining returns the sandboxes, pins, interfaces and addresses of the node, which runs no other
// pods.
func (n *node) remaining() string {
	var found []string
	if r, err := n.Runtime.ListPodSandbox(n.ctx, &runtimeapi.ListPodSandboxRequest{}); err != nil {
		found = append(found, err.Error())
	} else {
		for _, s := range r.Items {
			found = append(found, "sandbox "+s.Id)
		}
	}

	for _, pattern := range []string{
		"/run/netns/cni-*", "/sys/class/net/cni0/brif/*", "/var/lib/cni/networks/vm/10.*",
	} {
		files, _ := filepath.Glob(pattern)
		found = append(found, files...)
	}

	return strings.Join(found, ", ")
}
