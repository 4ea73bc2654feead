package conformance

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/test/engines"
)

// eachShim runs a test on a new node of every engine version with annotations (API 1.43), whose
// pods run under this project's containerd shim.
func eachShim(t *testing.T, test func(*testing.T, *node), args ...string) {
	t.Parallel()
	skipAtEndpoint(t)

	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, v)
			n.Daemon = n.eng.Daemon(t, append(args, "--containers=shim")...)
			test(t, n)
		})
	}
}

// shimName returns the program of the parent of a container's main process.
func (n *node) shimName(t *testing.T, id string) string {
	t.Helper()
	return path.Base(strings.TrimSpace(n.run(t, "readlink", "/proc/"+n.shim(t, id)+"/exe")))
}

// usesShim reports whether a container runs under the shim.
func (n *node) usesShim(t *testing.T, id string) bool {
	t.Helper()
	return n.inspect(t, id, ".HostConfig.Runtime") == annotation.Runtime
}

// TestShimPod checks a pod under the shim: one server for pause and containers, a pause without
// runc and without privileges, in the namespaces of the pod.
func TestShimPod(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		if c := n.condition(t, "ContainerdShim"); !c.Status || c.Reason != "CreatedByShim" {
			t.Errorf("condition ContainerdShim: %v, want reason CreatedByShim", c)
		}

		cfg := n.podConfig(t)
		cfg.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		if n.shim(t, pod) != n.shim(t, c) || n.shimName(t, pod) != engines.ShimPrograms[1] {
			t.Errorf("shims of pause and container: %s (%s), %s", n.shim(t, pod), n.shimName(t, pod), n.shim(t, c))
		}

		n.assertNetNSMode(t, pod, "own")
		n.assertNoCapabilities(t, pod)
		for field, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "0"} {
			if got := n.procStatus(t, pod, field); got != want {
				t.Errorf("%s of the pause: %s, want %s", field, got, want)
			}
		}

		n.assertRuncDoesNotKnow(t, pod)
		if got := n.exec(t, c, "cat", "/proc/sys/kernel/shm_rmid_forced"); got != "1\n" {
			t.Errorf("kernel.shm_rmid_forced = %q, want 1", got)
		}
		if got := n.exec(t, c, "hostname"); got != cfg.Hostname+"\n" {
			t.Errorf("host name %q, want %s", got, cfg.Hostname)
		}

		n.stopPod(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		eventually(t, "exit of the shim", func() bool {
			return !strings.Contains(n.run(t, "ps", "ax"), engines.ShimPrograms[1])
		})
	})
}

// statusFiles are the status of two processes in a container, as an exec sees them.
var statusFiles = map[string]string{"first process": "/proc/1/status", "exec": "/proc/self/status"}

// assertRuncDoesNotKnow checks that runc has no container with this ID.
func (n *node) assertRuncDoesNotKnow(t *testing.T, id string) {
	t.Helper()
	if got := n.run(t, "sh", "-c", "ls -d /run/containerd/runc/*/"+id+" 2>/dev/null || true"); got != "" {
		t.Errorf("runc started the pause: %s", got)
	}
}

// TestShimPauseSeccomp checks the filter of pauses with the profile RuntimeDefault.
func TestShimPauseSeccomp(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{
			ProfileType: runtimeapi.SecurityProfile_RuntimeDefault,
		}
		pod := n.runPod(t, cfg)
		if got := n.procStatus(t, pod, "Seccomp"); got != "2" {
			t.Errorf("Seccomp of the pause: %s, want 2 (a filter)", got)
		}

		n.assertRuncDoesNotKnow(t, pod)
	})
}

// TestStrictGroups checks SupplementalGroupsPolicy Strict: the groups of the request are used
// instead of those of the image (CRI SupplementalGroupsPolicy), for the first process and an exec.
func TestStrictGroups(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		if err != nil || !s.GetFeatures().GetSupplementalGroupsPolicy() {
			t.Errorf("features: %v, %v", s.GetFeatures(), err)
		}

		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		cfg.Linux.SecurityContext.SupplementalGroups = []int64{4321}
		pod := n.runPod(t, cfg)
		if got := n.procStatus(t, pod, "Groups"); got != "4321" {
			t.Errorf("groups of the pause: %q, want 4321", got)
		}

		for policy, want := range map[runtimeapi.SupplementalGroupsPolicy]string{
			runtimeapi.SupplementalGroupsPolicy_Strict: "1000 1234", // with the primary group
			runtimeapi.SupplementalGroupsPolicy_Merge:  "1000 1234 7777",
		} {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name = strings.ToLower(policy.String())
			sc := cc.Linux.SecurityContext
			sc.RunAsUsername, sc.SupplementalGroups, sc.SupplementalGroupsPolicy = "app", []int64{1234}, policy
			c := n.startConfig(t, pod, cfg, cc)
			for process, file := range statusFiles {
				got := strings.Fields(n.exec(t, c, "grep", "^Groups", file))[1:]
				slices.Sort(got)
				if strings.Join(got, " ") != want {
					t.Errorf("%v: groups of the %s: %v, want %s", policy, process, got, want)
				}
			}
		}
	})
}

// TestAmbientCapabilities checks that ambient capabilities are in all sets (CRI Capability), for
// the first process and for execs.
func TestAmbientCapabilities(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		sc := cc.Linux.SecurityContext
		sc.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		sc.Capabilities = &runtimeapi.Capability{
			DropCapabilities:       []string{"ALL"},
			AddAmbientCapabilities: []string{"NET_BIND_SERVICE"},
		}
		c := n.startConfig(t, pod, cfg, cc)
		for process, file := range statusFiles {
			got := n.exec(t, c, "grep", "^Cap", file)
			if strings.Count(got, "0000000000000400") != 5 { // CAP_NET_BIND_SERVICE is 10
				t.Errorf("capabilities of the %s:\n%s", process, got)
			}
		}

		n.exec(t, c, "timeout", "-s", "KILL", "1", "sh", "-c", "nc -l -p 80 & sleep 0.1; kill -0 $!")
	})
}

// TestLimitsOfTheFirstProcess checks that limits without a field in Docker's API hold before a
// container's first process runs: it reads its own.
func TestLimitsOfTheFirstProcess(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		files, want := "hugetlb/hugetlb.2MB.limit_in_bytes", "4194304\n"
		limits := &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
		}
		if n.run(t, "sh", "-c", "test -e /sys/fs/cgroup/memory || echo v2") != "" {
			files, want = "hugetlb.2MB.max memory.oom.group", want+"1\n"
			limits.Unified = map[string]string{"memory.oom.group": "1"}
		}

		cc := n.containerConfig(sh("cd /sys/fs/cgroup; cat " + files + " > /part; mv /part /first; sleep 1000"))
		cc.Linux.Resources = limits

		for i := range 5 { // the daemon writes the limits after the start as well
			cc.Metadata.Name = fmt.Sprint("c", i)
			c := n.startConfig(t, pod, cfg, cc)
			var got string
			eventually(t, "the first process reads its limits", func() bool {
				got = n.exec(t, c, "sh", "-c", "cat /first || true")
				return got != ""
			})
			if got != want {
				t.Errorf("limits of the first process: %q, want %q", got, want)
			}
		}
	})
}

// TestMountOptions checks further options of a mount (CRI Mount, mount_options).
func TestMountOptions(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		skipUnlessReported(t, s.GetFeatures().GetMountOptions(), "mount options")
		if err != nil || !s.GetFeatures().GetMountOptions() {
			t.Errorf("features: %v, %v", s.GetFeatures(), err)
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("cp /bin/busybox /v/busybox; sleep 1000"))
		options := []string{"noexec", "nosuid", "nodev"}
		cc.Mounts = []*runtimeapi.Mount{{HostPath: n.tempDir(t), ContainerPath: "/v", MountOptions: options}}
		c := n.startConfig(t, pod, cfg, cc)
		got := n.exec(t, c, "grep", " /v ", "/proc/mounts")
		for _, o := range options {
			if !strings.Contains(got, ","+o) {
				t.Errorf("mount without %s: %s", o, got)
			}
		}

		n.exec(t, c, "sh", "-c", "test -e /v/busybox || sleep 1; /v/busybox true 2>&1 | grep -q 'Permission denied'")
		if got := n.containerStatus(t, c).Mounts[0].MountOptions; !slices.Equal(got, options) {
			t.Errorf("options in the status: %v", got)
		}

		cc.Mounts[0].MountOptions = []string{"suid"}
		_, err = n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "mount_options[0]") {
			t.Errorf("option suid: %v, want InvalidArgument", err)
		}
	})
}

// TestKilledShim kills the server of a pod. containerd then cleans up: all processes of the pod
// end, the engine sees it, and the pod can be removed without leftovers.
func TestKilledShim(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		pause := n.inspect(t, pod, ".State.Pid")
		n.run(t, "kill", "-KILL", n.shim(t, pod))
		eventually(t, "end of the pod", func() bool {
			return n.podStatus(t, pod).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY &&
				n.containerStatus(t, c).State == runtimeapi.ContainerState_CONTAINER_EXITED
		})

		if got := n.run(t, "sh", "-c", "test ! -e /proc/"+pause+" || echo runs"); got != "" {
			t.Errorf("pause %s is running after its server was killed", pause)
		}
		if s := n.containerStatus(t, c); s.ExitCode != 137 {
			t.Errorf("exit code %d of a container of a killed server, want 137", s.ExitCode)
		}

		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		find := "find /sys/fs/cgroup -type d -name " + pod + " 2>/dev/null || true" // other groups come and go
		if got := n.run(t, "sh", "-c", find); got != "" {
			t.Errorf("control groups of the pause: %s", got)
		}
	})
}

// TestShimAutoFallsBack checks --containers=auto and shim with an engine that does not find the
// shim.
func TestShimAutoFallsBack(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)

	n := newNode(t, engines.V29)
	for _, program := range engines.ShimPrograms {
		n.run(t, "rm", n.eng.Dir+"/bin/"+program)
	}

	auto := n.withDaemon(t, "--containers=auto")
	if c := auto.condition(t, "ContainerdShim"); c.Status || c.Reason != "CreatedByEngine" ||
		!strings.Contains(c.Message, "containerd-shim-cri-dockerd-v1") {
		t.Errorf("condition ContainerdShim: %v, want the name of the missing program", c)
	}

	cfg := auto.podConfig(t)
	pod := auto.runPod(t, cfg)
	auto.start(t, pod, cfg, sh("sleep 1000"))
	auto.removePod(t, pod)
	auto.assertNoLeftovers(t, cfg)

	auto.Change(t, "--containers=shim")
	auto.AwaitReady(t)
	_, err := auto.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: auto.podConfig(t)})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), engines.ShimPrograms[0]) {
		t.Errorf("RunPodSandbox without the required shim: %v, want FailedPrecondition", err)
	}
}

// TestShimHostPod checks a pod in the node's network, IPC and PID namespaces, and one with a shared
// PID namespace: both pauses start without runc.
func TestShimHostPod(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		node := runtimeapi.NamespaceMode_NODE
		cfg := n.podConfig(t)
		cfg.Hostname = ""
		cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: node, Ipc: node, Pid: node}
		pod := n.runPod(t, cfg)
		n.assertRuncDoesNotKnow(t, pod)
		for _, ns := range []string{"net", "ipc", "pid", "uts"} {
			of := func(pid string) string { return n.run(t, "readlink", "/proc/"+pid+"/ns/"+ns) }
			if pause := of(n.inspect(t, pod, ".State.Pid")); pause != of("1") {
				t.Errorf("%s namespace of the pause: %s, want the node's", ns, pause)
			}
		}

		shared := n.podConfig(t)
		shared.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		pod = n.runPod(t, shared)
		n.assertRuncDoesNotKnow(t, pod)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		c := n.startConfig(t, pod, shared, cc)
		if got := n.exec(t, c, "cat", "/proc/1/comm"); got != "pause\n" {
			t.Errorf("process 1 of the pod: %q, want pause", got)
		}

		n.exec(t, c, "sh", "-c", "(sleep 0.1 &) ; sleep 0.3")
		if got := n.exec(t, c, "ps"); strings.Contains(got, "Z") {
			t.Errorf("the pause does not reap orphans:\n%s", got)
		}
	})
}

// TestShimDockerCommands runs Docker's commands on a pause under the shim.
func TestShimDockerCommands(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		for _, id := range []string{pod, c} {
			n.docker(t, "ps", "--filter", "id="+id)
			n.docker(t, "top", id)
			n.docker(t, "stats", "--no-stream", id)
			n.docker(t, "diff", id)
			n.docker(t, "logs", c)
			n.docker(t, "pause", id)
			if got := n.inspect(t, id, ".State.Status"); got != "paused" {
				t.Errorf("status after docker pause: %s", got)
			}
			n.docker(t, "unpause", id)
			n.docker(t, "update", "--cpu-shares", "100", id)
			if got := n.inspect(t, id, ".State.Status"); got != "running" {
				t.Errorf("status after docker unpause: %s", got)
			}
		}

		n.docker(t, "exec", c, "true")
		n.docker(t, "cp", c+":/etc/passwd", n.eng.Dir+"/passwd")
		out, err := n.eng.Command("docker", "-H", "unix://"+n.eng.Socket, "exec", pod, "/pause").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "exec in pause") {
			t.Errorf("docker exec in a pause: %v, %s; want a refusal", err, out)
		}

		n.docker(t, "stop", c)
		n.docker(t, "start", c)
		n.docker(t, "kill", c)
		n.docker(t, "stop", "-t", "5", pod)
		if got := n.inspect(t, pod, ".State.ExitCode"); got != "0" {
			t.Errorf("exit code of a stopped pause: %s, want 0", got)
		}
	})
}
