package conformance

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestVersion checks Version and RuntimeConfig.
func TestVersion(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		v, err := n.Runtime.Version(t.Context(), &runtimeapi.VersionRequest{})
		if err != nil {
			t.Fatal(err)
		}

		if v.RuntimeName != "docker" || v.RuntimeApiVersion != "v1" ||
			!strings.HasPrefix(v.RuntimeVersion, string(n.own(t).Version)) {
			t.Errorf("Version: %v", v)
		}

		c, err := n.Runtime.RuntimeConfig(t.Context(), &runtimeapi.RuntimeConfigRequest{})
		driver := strings.TrimSpace(n.docker(t, "info", "-f", "{{.CgroupDriver}}"))
		if err != nil || c.GetLinux() == nil || strings.ToLower(c.Linux.CgroupDriver.String()) != driver {
			t.Errorf("RuntimeConfig: %v, %v, want driver %s", c, err, driver)
		}
	})
}

// TestStatus checks that all conditions of a healthy node are true. An engine may be too old for
// the containerd shim.
func TestStatus(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
		if err != nil {
			t.Fatal(err)
		}

		for _, c := range s.Status.Conditions {
			if !c.Status && (c.Type != "ContainerdShim" || c.Reason != "NotSupported") {
				t.Errorf("%s is false: %s %s", c.Type, c.Reason, c.Message)
			}
		}

		if len(s.RuntimeHandlers) == 0 || len(s.Info) == 0 {
			t.Errorf("Status lacks runtime handlers or info: %v", s)
		}
	})
}

// TestUnimplementedNamesTheMethod checks the error of an RPC without an implementation.
func TestUnimplementedNamesTheMethod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		_, err := n.Runtime.CheckpointPod(t.Context(), &runtimeapi.CheckpointPodRequest{PodSandboxId: "0123"})
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "CheckpointPod") {
			t.Errorf("CheckpointPod: %v", err)
		}
	})
}

// TestPodLifecycle takes a pod through its lifecycle and checks the status after each step.
func TestPodLifecycle(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Labels = map[string]string{"app": "web", "io.kubernetes.pod.name": cfg.Metadata.Name}
		cfg.Annotations = map[string]string{"example.com/note": "two words, and a ünicode"}
		id := n.runPod(t, cfg)

		s := n.podStatus(t, id)
		if s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Network.GetIp() == "" || s.CreatedAt == 0 {
			t.Errorf("status of a running pod: %v", s)
		}

		if s.Metadata.Name != cfg.Metadata.Name || s.Metadata.Uid != cfg.Metadata.Uid ||
			s.Metadata.Namespace != "default" {
			t.Errorf("metadata: %v", s.Metadata)
		}

		if s.Labels["app"] != "web" || s.Annotations["example.com/note"] != cfg.Annotations["example.com/note"] ||
			len(s.Annotations) != 1 {
			t.Errorf("labels %v, annotations %v", s.Labels, s.Annotations)
		}

		again, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if err == nil && again.PodSandboxId != id || err != nil && status.Code(err) != codes.AlreadyExists {
			t.Errorf("second RunPodSandbox: %v, %v", again, err)
		}

		n.stopPod(t, id)
		n.stopPod(t, id)
		if s := n.podStatus(t, id); s.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("state after StopPodSandbox: %v, want NotReady", s.State)
		}

		n.removePod(t, id)
		n.removePod(t, id)
		if _, err := n.Runtime.PodSandboxStatus(t.Context(),
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: id}); status.Code(err) != codes.NotFound {
			t.Errorf("PodSandboxStatus of a removed pod: %v, want NotFound", err)
		}

		n.assertNoLeftovers(t, cfg)
	})
}

// TestStopPodStopsItsContainers stops a pod with a container that ignores SIGTERM.
func TestStopPodStopsItsContainers(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		c := n.start(t, id, cfg, sh("trap '' TERM; while true; do sleep 1; done"))
		begin := time.Now()
		n.stopPod(t, id)
		if d := time.Since(begin); d > scaled(8*time.Second) {
			t.Errorf("StopPodSandbox took %v, want at most 8 s", d)
		}
		if s := n.containerStatus(t, c); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("container after StopPodSandbox: %v", s.State)
		}

		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestRemoveRunningPod removes a pod without a stop.
func TestRemoveRunningPod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		n.start(t, id, cfg, sh("sleep 1000"))
		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestPauseKilledWithDocker kills and removes pauses with docker. The pods become NotReady and can
// be removed.
func TestPauseKilledWithDocker(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		n.docker(t, "kill", id)
		eventually(t, "NotReady pod", func() bool {
			return n.podStatus(t, id).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
		})
		n.stopPod(t, id)
		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)

		id = n.runPod(t, cfg)
		n.docker(t, "rm", "-f", id)
		n.stopPod(t, id)
		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestUnknownIDs checks the responses to unknown IDs. Stops and removals succeed.
func TestUnknownIDs(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
		n.stopPod(t, id)
		n.removePod(t, id)
		if _, err := n.Runtime.StopContainer(t.Context(),
			&runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			t.Errorf("StopContainer: %v", err)
		}

		if _, err := n.Runtime.RemoveContainer(t.Context(),
			&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Errorf("RemoveContainer: %v", err)
		}

		for name, call := range map[string]func() error{
			"PodSandboxStatus": func() error {
				_, err := n.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
				return err
			},
			"ContainerStatus": func() error {
				_, err := n.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
				return err
			},
			"StartContainer": func() error {
				_, err := n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id})
				return err
			},
			"ExecSync": func() error {
				_, err := n.Runtime.ExecSync(t.Context(),
					&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				if err := call(); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), id[:12]) {
					t.Errorf("%s: %v, want NotFound", name, err)
				}
			})
		}
	})
}

// TestHostNetwork checks the status and the namespace of a pod on the host network.
func TestHostNetwork(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Hostname = ""
		cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		id := n.runPod(t, cfg)
		s := n.podStatus(t, id)
		if s.Network.GetIp() != "" ||
			s.Linux.GetNamespaces().GetOptions().GetNetwork() != runtimeapi.NamespaceMode_NODE {
			t.Errorf("status of a host network pod: %v", s)
		}

		c := n.start(t, id, cfg, sh("sleep 1000"))
		want := strings.TrimSpace(n.run(t, "readlink", "/proc/self/ns/net"))
		if got := strings.TrimSpace(n.exec(t, c, "readlink", "/proc/self/ns/net")); got != want {
			t.Errorf("network namespace of the container %s, want %s of the node", got, want)
		}
	})
}

// TestPidModes checks process 1 in every PID mode.
func TestPidModes(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		for mode, want := range map[runtimeapi.NamespaceMode]func(pid1 string) bool{
			runtimeapi.NamespaceMode_CONTAINER: func(c string) bool { return strings.HasPrefix(c, "sleep") },
			runtimeapi.NamespaceMode_POD:       func(c string) bool { return strings.HasPrefix(c, "/pause") },
			runtimeapi.NamespaceMode_NODE: func(c string) bool {
				return !strings.HasPrefix(c, "sleep") && !strings.HasPrefix(c, "/pause")
			},
		} {
			t.Run(mode.String(), func(t *testing.T) {
				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext.NamespaceOptions.Pid = mode
				id := n.runPod(t, cfg)
				if got := n.podStatus(t, id).Linux.GetNamespaces().GetOptions().GetPid(); got != mode {
					t.Errorf("PodSandboxStatus has PID mode %v, want %v", got, mode)
				}

				cc := n.containerConfig(sh("exec sleep 1000"))
				cc.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: mode}
				c := n.startConfig(t, id, cfg, cc)
				var got string
				hasPID1 := func() bool { // after the exec of the shell
					got = strings.ReplaceAll(n.exec(t, c, "cat", "/proc/1/cmdline"), "\x00", " ")
					return want(got)
				}
				if !within(20*time.Second, hasPID1) {
					t.Errorf("process 1 is %q", got)
				}
			})
		}
	})
}

// TestDNSAndHostname checks resolv.conf and the host name.
func TestDNSAndHostname(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Hostname = "web-0"
		cfg.DnsConfig = &runtimeapi.DNSConfig{
			Servers:  []string{"127.0.0.53"},
			Searches: []string{"default.svc.cluster.local", "cluster.local"},
			Options:  []string{"ndots:5"},
		}

		id := n.runPod(t, cfg)
		c := n.start(t, id, cfg, sh("sleep 1000"))
		got := n.exec(t, c, "cat", "/etc/resolv.conf")
		for _, want := range []string{
			"nameserver 127.0.0.53\n",
			"search default.svc.cluster.local cluster.local\n",
			"options ndots:5\n",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("resolv.conf lacks %q:\n%s", want, got)
			}
		}

		if got := n.exec(t, c, "hostname"); got != "web-0\n" {
			t.Errorf("hostname: %q", got)
		}

		host := n.podConfig(t)
		host.Hostname, host.DnsConfig = "", cfg.DnsConfig
		host.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		c = n.start(t, n.runPod(t, host), host, sh("sleep 1000"))
		if onHost := n.exec(t, c, "cat", "/etc/resolv.conf"); onHost != got {
			t.Errorf("resolv.conf on the host network:\n%s", onHost)
		}
	})
}

// TestSysctls checks that sysctls apply to the pod only.
func TestSysctls(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "80",
			"kernel.shm_rmid_forced":              "1",
			"net.ipv4.ip_local_port_range":        "40000\t40100",
			"net.core.somaxconn":                  "1234",
		}

		c := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		for name, want := range cfg.Linux.Sysctls {
			file := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
			if got := n.exec(t, c, "cat", file); got != want+"\n" {
				t.Errorf("%s is %q in the pod, want %q", name, got, want)
			}
			if n.eng != nil && n.run(t, "cat", file) == want+"\n" {
				t.Errorf("%s has the same value on the node", name)
			}
		}
	})
}

// TestHostPort fetches a page from a host port.
func TestHostPort(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.PortMappings = []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_TCP,
			ContainerPort: 8080,
			HostPort:      18080,
		}}

		id := n.runPod(t, cfg)
		n.start(t, id, cfg, sh("mkdir /www; echo page of the pod > /www/index.html; exec httpd -f -p 8080 -h /www"))
		ip := n.podStatus(t, id).Network.Ip
		eventually(t, "page at the pod's address", func() bool {
			return strings.Contains(n.get(ip+":8080"), "page of the pod")
		})
		gateway := ip[:strings.LastIndex(ip, ".")] + ".1"
		eventually(t, "page at the host port", func() bool {
			return strings.Contains(n.get(gateway+":18080"), "page of the pod")
		})
		n.removePod(t, id)
		if rules := n.run(t, "iptables-save"); strings.Contains(rules, "18080") {
			t.Errorf("rules of the host port remain:\n%s", rules)
		}
	})
}

// TestCgroupParent checks that the processes of a pod are in its cgroup.
func TestCgroupParent(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("burstable", "pod"+cfg.Metadata.Uid)
		id := n.runPod(t, cfg)
		c := n.start(t, id, cfg, sh("sleep 1000"))
		got := n.run(t, "sh", "-c", "cd /sys/fs/cgroup; [ -e cgroup.controllers ] || cd memory; "+
			"cat ."+cfg.Linux.CgroupParent+"/*/cgroup.procs | wc -l")
		if strings.TrimSpace(got) != "2" {
			t.Errorf("processes in the pod's cgroup: %q, want 2 with container %s", got, c)
		}
	})
}

// TestGroupsOfThePause checks that a pod's pause is in the pod's control group in all hierarchies,
// and stays there when containers start and end beside it. With cgroup v1 systemd moves the
// processes of a slice out of the hierarchies that no unit of the slice needs, and so also those of
// a container that runc is just starting.
func TestGroupsOfThePause(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("burstable", "pod"+cfg.Metadata.Uid)
		id := n.runPod(t, cfg)
		n.needsShim(t, id, "systemd moves a pause that runc starts")
		pid := n.pid(t, id)
		n.assertInGroup(t, pid, cfg.Linux.CgroupParent)

		for range 3 {
			n.waitExited(t, n.start(t, id, cfg, sh("true")))
			n.assertInGroup(t, pid, cfg.Linux.CgroupParent)
		}
	})
}

// assertInGroup checks that a process is below a control group in each hierarchy with controllers,
// or in the only one (cgroups(7), /proc/[pid]/cgroup).
func (n *node) assertInGroup(t *testing.T, pid, group string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(n.run(t, "cat", "/proc/"+pid+"/cgroup")), "\n")
	for _, line := range lines {
		f := strings.SplitN(line, ":", 3)
		isUnified := f[0] == "0"
		if (!isUnified || len(lines) == 1) && !strings.Contains(f[2], group+"/") {
			t.Errorf("process %s is in group %q, want it below %s", pid, line, group)
		}
	}
}

// TestPodsDuringReexec runs and removes pods while systemd executes itself again and again, as at
// its upgrade.
func TestPodsDuringReexec(t *testing.T) {
	n := nodeOfSystemd(t)
	n.needsShim(t, n.runPod(t, n.podConfig(t)), "the start of a pause by runc may fail during a reexecution")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	reexecs := 0
	wg.Go(func() {
		for ctx.Err() == nil {
			if exec.CommandContext(ctx, "systemctl", "daemon-reexec").Run() == nil {
				reexecs++
			}
			time.Sleep(100 * time.Millisecond)
		}
	})

	for range 10 {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("burstable", "pod"+cfg.Metadata.Uid)
		id := n.runPod(t, cfg)
		n.assertInGroup(t, n.pid(t, id), cfg.Linux.CgroupParent)
		n.removePod(t, id)
	}

	cancel()
	wg.Wait()
	if t.Log(reexecs, "reexecutions"); reexecs < 5 {
		t.Errorf("systemd was executed again %d times only", reexecs)
	}
}

// TestListPods checks every field of the filter.
func TestListPods(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		a, b := n.podConfig(t), n.podConfig(t)
		a.Labels = map[string]string{"group": a.Metadata.Uid, "tier": "one"}
		b.Labels = map[string]string{"group": a.Metadata.Uid, "tier": "two"}
		idA := n.runPod(t, a)
		idB := n.runPod(t, b)
		n.stopPod(t, idB)
		ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
		notReady := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
		group := map[string]string{"group": a.Metadata.Uid}
		for name, c := range map[string]struct {
			filter *runtimeapi.PodSandboxFilter
			want   []string
		}{
			"labels":       {&runtimeapi.PodSandboxFilter{LabelSelector: group}, []string{idB, idA}},
			"one label":    {&runtimeapi.PodSandboxFilter{LabelSelector: b.Labels}, []string{idB}},
			"ready":        {&runtimeapi.PodSandboxFilter{LabelSelector: group, State: ready}, []string{idA}},
			"not ready":    {&runtimeapi.PodSandboxFilter{LabelSelector: group, State: notReady}, []string{idB}},
			"id":           {&runtimeapi.PodSandboxFilter{Id: idA}, []string{idA}},
			"id prefix":    {&runtimeapi.PodSandboxFilter{Id: idA[:13]}, []string{idA}},
			"id and state": {&runtimeapi.PodSandboxFilter{Id: idA, State: notReady}, nil},
			"no match":     {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"group": "other"}}, nil},
		} {
			t.Run(name, func(t *testing.T) {
				r, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: c.filter})
				if err != nil {
					t.Fatal(err)
				}

				var got []string
				for _, p := range r.Items {
					got = append(got, p.Id)
				}

				if fmt.Sprint(got) != fmt.Sprint(c.want) {
					t.Errorf("got %v, want %v", got, c.want)
				}
			})
		}
	})
}
