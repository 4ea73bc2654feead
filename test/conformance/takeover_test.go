package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestTakeover starts our daemon on a node with pods of the three older shims. The pods keep
// running, are reported correctly, work, and leave nothing behind when they are removed.
func TestTakeover(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := newForeignNode(t, n)
		var pods []*foreignPod
		for _, a := range olderShims(f.newRoot) {
			pods = append(pods, f.pod(t, a))
		}

		f.daemon(t)
		for _, p := range pods {
			t.Run(p.olderShim.name, func(t *testing.T) {
				f.assertAdopted(t, p)
				f.assertLog(t, p)
				f.assertWorks(t, p)
				if got := f.processes(t, p); got != p.pids {
					t.Errorf("processes before the takeover:\n%s\nafter it:\n%s", p.pids, got)
				}

				f.killAndRestart(t)
				f.assertAdopted(t, p)
				f.assertRemoval(t, p)
			})
		}
	})
}

// killAndRestart kills the daemon with SIGKILL and restarts it.
func (f *foreignNode) killAndRestart(t *testing.T) {
	t.Helper()
	f.Kill(t)
	f.Restart(t)
}

// assertAdopted checks the lists and statuses of a pod.
func (f *foreignNode) assertAdopted(t *testing.T, p *foreignPod) {
	t.Helper()
	s := f.podStatus(t, p.sandbox)
	want := p.config.Metadata
	if s.Metadata.String() != want.String() || s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.CreatedAt == 0 {
		t.Errorf("PodSandboxStatus: %v", s)
	}
	if s.Network.GetIp() != p.ip || s.Linux.Namespaces.Options.Network != runtimeapi.NamespaceMode_POD {
		t.Errorf("address %q, want %s; namespaces %v", s.Network.GetIp(), p.ip, s.Linux.Namespaces)
	}

	if !p.terse && (s.Labels["app"] != p.olderShim.name || s.Annotations["example.org/note"] != "kept" ||
		s.Labels["io.kubernetes.container.name"] != "") {
		t.Errorf("labels %v, annotations %v", s.Labels, s.Annotations)
	}

	l, err := f.Runtime.ListPodSandbox(t.Context(),
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})
	if err != nil || len(l.Items) != 1 || l.Items[0].Metadata.String() != want.String() {
		t.Errorf("ListPodSandbox: %v, %v", l, err)
	}

	c := f.containerStatus(t, p.container)
	if c.Metadata.Name != "main" || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING || c.LogPath != p.log ||
		c.StartedAt == 0 || c.Labels["io.kubernetes.container.name"] != "main" {
		t.Errorf("ContainerStatus: %v", c)
	}

	containers, err := f.Runtime.ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.sandbox}})
	if err != nil || len(containers.Containers) != 1 {
		t.Errorf("ListContainers: %v, %v", containers, err)
	}
}

// assertLog reads a container's log and rotates it like the kubelet.
func (f *foreignNode) assertLog(t *testing.T, p *foreignPod) {
	t.Helper()
	eventually(t, "first line of the log", func() bool { return strings.HasPrefix(f.log(t, p.log), "first line\n") })
	rotated := p.log + ".20260102-030405"
	if err := os.Rename(p.log, rotated); err != nil {
		t.Fatal(err)
	}

	if _, err := f.Runtime.ReopenContainerLog(t.Context(),
		&runtimeapi.ReopenContainerLogRequest{ContainerId: p.container}); err != nil {
		t.Fatal(err)
	}

	if s := f.log(t, rotated); !strings.HasPrefix(s, "first line\n") {
		t.Errorf("rotated log: %q", s)
	}

	eventually(t, "line in the new log", func() bool { return strings.HasPrefix(f.log(t, p.log), "again\n") })
}

// assertWorks uses a pod: its address and host port, exec, stats, another container.
func (f *foreignNode) assertWorks(t *testing.T, p *foreignPod) {
	t.Helper()
	page := "page of " + p.config.Metadata.Name + "\n"
	for _, addr := range []string{p.ip + ":8080", fmt.Sprintf("192.0.2.1:%d", p.port)} {
		if got := f.get(addr); got != page {
			t.Errorf("page at %s: %q", addr, got)
		}
	}

	if out := f.exec(t, p.container, "hostname"); out != p.config.Hostname+"\n" {
		t.Errorf("exec: %q", out)
	}

	r, err := f.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: p.container})
	if err != nil || r.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 ||
		r.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("ContainerStats: %v, %v", r, err)
	}

	pod, err := f.Runtime.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.sandbox})
	if err != nil || pod.Stats.GetLinux().GetNetwork().GetDefaultInterface().GetRxBytes().GetValue() == 0 {
		t.Errorf("PodSandboxStats: %v, %v", pod, err)
	}

	second := f.containerConfig(sh("cat /etc/resolv.conf; sleep 1000"))
	second.Metadata.Name, second.LogPath = "second", "second_0.log"
	id := f.startConfig(t, p.sandbox, p.config, second)
	if theirs, ours := f.exec(t, p.container, "cat", "/etc/resolv.conf"),
		f.exec(t, id, "cat", "/etc/resolv.conf"); theirs != ours {
		t.Errorf("resolv.conf of the old container %q, of a new one %q", theirs, ours)
	}

	if got := f.exec(t, id, "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"); got != page {
		t.Errorf("page in a new container: %q", got)
	}

	if _, err := f.Runtime.RemoveContainer(t.Context(),
		&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

// assertRemoval stops and removes a pod and checks for leftovers.
func (f *foreignNode) assertRemoval(t *testing.T, p *foreignPod) {
	t.Helper()
	if held := f.held(t, p); !strings.Contains(held, "rules") || !strings.Contains(held, "networks/cbr0/"+p.ip) ||
		!strings.Contains(held, p.checkpoint) {
		t.Errorf("running pod holds only %s", held)
	}

	if _, err := f.Runtime.StopContainer(t.Context(),
		&runtimeapi.StopContainerRequest{ContainerId: p.container, Timeout: 1}); err != nil {
		t.Error(err)
	}

	if s := f.containerStatus(t, p.container); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("status after StopContainer: %v", s)
	}

	f.stopPod(t, p.sandbox)
	if held := f.held(t, p); held != "" {
		t.Errorf("stopped pod holds %s", held)
	}
	if _, err := os.Lstat(p.log); err != nil {
		t.Errorf("log of an exited container: %v", err)
	}

	f.removePod(t, p.sandbox)
	if _, err := os.Lstat(p.log); !os.IsNotExist(err) {
		t.Errorf("log of the removed container: %v, want none", err)
	}

	if out := f.docker(t, "ps", "-aq", "--filter", "name="+p.config.Metadata.Uid); strings.TrimSpace(out) != "" {
		t.Errorf("containers remain: %s", out)
	}
	if files, _ := filepath.Glob(filepath.Join(p.config.LogDirectory, "main", ".*")); len(files) > 0 {
		t.Errorf("files remain in the log directory: %v", files)
	}
}

// TestTakeoverOfUnusualPods starts our daemon on a node with leftovers of crashed older shims, and
// with pods outside of CNI.
func TestTakeoverOfUnusualPods(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := newForeignNode(t, n)
		all := olderShims(f.newRoot)
		dead, removed, removedOld := f.pod(t, all[1]), f.pod(t, all[2]), f.pod(t, all[0])
		f.docker(t, "kill", dead.sandbox)
		f.docker(t, "rm", "-f", removed.sandbox, removed.container, removedOld.sandbox, removedOld.container)
		empty := f.runBarePod(t, all[0], "none") // between RunPodSandbox and CreateContainer
		f.connect(t, empty)
		f.writeCheckpoint(t, empty)
		host, bridged := f.runBarePod(t, all[2], "host"), f.runBarePod(t, all[2], "bridge")
		f.writeCheckpoint(t, host)
		f.writeCheckpoint(t, bridged)
		orphan := f.pod(t, all[2])
		f.docker(t, "rm", "-f", orphan.sandbox)
		exited := f.pod(t, all[2])
		eventually(t, "first line of the log", func() bool {
			return strings.HasPrefix(f.log(t, exited.log), "first line\n")
		})
		f.docker(t, "kill", exited.container)
		renamed := f.pod(t, all[2])
		f.docker(t, "rename", renamed.sandbox, "renamed")
		f.daemon(t)

		for shim, p := range map[string]*foreignPod{"older cri-dockerd": removed, "dockershim": removedOld} {
			eventually(t, "release of the network of a removed pod of "+shim, func() bool {
				return f.held(t, p) == ""
			})
			f.stopPod(t, p.sandbox) // the kubelet may still know the pod
			f.removePod(t, p.sandbox)
		}

		if held := f.held(t, renamed); !strings.Contains(held, "rules") || !strings.Contains(held, renamed.checkpoint) {
			t.Errorf("the renamed running sandbox holds only %s", held)
		}

		f.docker(t, "rm", "-f", renamed.sandbox, renamed.container)
		f.killAndRestart(t)
		eventually(t, "release of the renamed pod's network", func() bool { return f.held(t, renamed) == "" })
		f.assertBare(t, empty, runtimeapi.NamespaceMode_POD, empty.ip)
		f.assertBare(t, host, runtimeapi.NamespaceMode_NODE, "")
		f.assertBare(t, bridged, runtimeapi.NamespaceMode_POD,
			f.inspect(t, bridged.sandbox).NetworkSettings.Networks["bridge"].IPAddress.String())
		if s := f.podStatus(t, dead.sandbox); s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("status of the pod with a dead pause: %v", s)
		}

		for id, want := range map[string]runtimeapi.ContainerState{
			dead.container:   runtimeapi.ContainerState_CONTAINER_RUNNING,
			orphan.container: runtimeapi.ContainerState_CONTAINER_RUNNING,
			exited.container: runtimeapi.ContainerState_CONTAINER_EXITED,
		} {
			if s := f.containerStatus(t, id); s.State != want {
				t.Errorf("ContainerStatus: %v, want %v", s, want)
			}
		}

		if s := f.containerStatus(t, exited.container); s.ExitCode != 137 || s.FinishedAt == 0 ||
			!strings.HasPrefix(f.log(t, s.LogPath), "first line") {
			t.Errorf("status of the exited container: %v", s)
		}

		for _, p := range []*foreignPod{dead, empty, host, bridged, orphan, exited} {
			f.stopPod(t, p.sandbox)
			f.removePod(t, p.sandbox)
			if held := f.held(t, p); held != "" {
				t.Errorf("removed pod %s holds %s", p.name("POD"), held)
			}
		}

		if out := f.docker(t, "ps", "-aq"); strings.TrimSpace(out) != "" {
			t.Errorf("containers remain: %s", out)
		}
	})
}

// TestTakeoverOfKubenet takes over a pod of dockershim's kubenet. New pods share its bridge, and
// its address is released with the pod.
func TestTakeoverOfKubenet(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := newForeignNode(t, n)
		p := f.pod(t, olderShim{
			name:  "kubenet",
			root:  "/var/lib/dockershim",
			terse: true,
			kubenet: `{"cniVersion":"0.1.0","name":"kubenet","type":"bridge","bridge":"cbr0",
			"mtu":1500,"addIf":"eth0","isGateway":true,"ipMasq":false,"hairpinMode":true,
			"ipam":{"type":"host-local","subnet":"10.88.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}}`,
		})
		if out, code := f.takeover(t, "--dry-run", "--network-plugin=kubenet"); code != 3 ||
			!strings.Contains(out, fmt.Sprintf("only the older shim can remove its rules for [%d->8080/tcp]", p.port)) {
			t.Errorf("dry run: exit code %d, %s", code, out)
		}

		f.Daemon = f.eng.Daemon(t, "--cri-dockerd-root-directory="+f.newRoot)
		f.assertAdopted(t, p)
		cfg := f.podConfig(t)
		id := f.runPod(t, cfg)
		f.start(t, id, cfg, sh("mkdir /www; echo a new page > /www/index.html; exec httpd -f -p 8080 -h /www"))
		ip := f.podStatus(t, id).Network.GetIp()
		if ip == p.ip || ip == "" {
			t.Errorf("address of the new pod %q, of the old pod %s", ip, p.ip)
		}

		eventually(t, "connection between the pods", func() bool {
			r, err := f.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
				ContainerId: p.container,
				Cmd:         []string{"wget", "-q", "-O", "-", "http://" + ip + ":8080/"},
				Timeout:     10,
			})
			return err == nil && string(r.Stdout) == "a new page\n"
		})

		if got := f.processes(t, p); got != p.pids {
			t.Errorf("processes before the takeover:\n%s\nafter it:\n%s", p.pids, got)
		}
		if held := f.held(t, p); !strings.Contains(held, "networks/kubenet/"+p.ip) {
			t.Errorf("running pod holds only %s", held)
		}

		f.stopPod(t, p.sandbox)
		f.removePod(t, p.sandbox)
		if held := f.held(t, p); held != "" {
			t.Errorf("removed pod holds %s", held)
		}
	})
}

// runBarePod runs a pod without containers in a network mode of Docker.
func (f *foreignNode) runBarePod(t *testing.T, a olderShim, mode container.NetworkMode) *foreignPod {
	t.Helper()
	f.podCount++
	p := &foreignPod{olderShim: a, config: f.podConfig(t), port: 18100 + f.podCount}
	p.sandbox = f.sandbox(t, p, mode)
	return p
}

// assertBare checks that a pod without containers is adopted and not removed.
func (f *foreignNode) assertBare(t *testing.T, p *foreignPod, mode runtimeapi.NamespaceMode, ip string) {
	t.Helper()
	s := f.podStatus(t, p.sandbox)
	if s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Linux.Namespaces.Options.Network != mode ||
		s.Network.GetIp() != ip {
		t.Errorf("PodSandboxStatus: %v, want %v and address %q", s, mode, ip)
	}
}
