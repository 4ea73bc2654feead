package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// TestSemantics tests the CRI where Docker's API has other defaults, limits or texts.
func TestSemantics(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		for name, subtest := range map[string]func(*testing.T, *node){
			"seccomp":      seccompSemantics,
			"exec":         execSemantics,
			"failed start": failedStartSemantics,
			"memory":       memorySemantics,
			"mount paths":  mountPathSemantics,
			"CDI":          cdiSemantics,
			"image volume": imageVolumeSemantics,
		} {
			t.Run(name, func(t *testing.T) { subtest(t, n) })
		}

		t.Run("umask", func(t *testing.T) { umaskSemantics(t, n) }) // restarts the daemon
	})
}

// seccompSemantics checks that no profile means unconfined, and that a privileged container has
// none.
func seccompSemantics(t *testing.T, n *node) {
	const off, filter = "0", "2" // prctl(2), PR_GET_SECCOMP
	profile := filepath.Join(n.tempDir(t), "no-mkdir.json")
	err := os.WriteFile(profile,
		[]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`),
		0o644)
	if err != nil {
		t.Fatal(err)
	}

	local := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: profile}
	missing := &runtimeapi.SecurityProfile{
		ProfileType:  runtimeapi.SecurityProfile_Localhost,
		LocalhostRef: "/no/such/profile",
	}

	for name, c := range map[string]struct {
		profile    *runtimeapi.SecurityProfile
		path       string
		privileged bool
		want       string
	}{
		"unset":                    {nil, "", false, off},
		"default":                  {&runtimeapi.SecurityProfile{}, "", false, filter},
		"localhost":                {local, "", false, filter},
		"default, string":          {nil, "runtime/default", false, filter},
		"unconfined, string":       {nil, "unconfined", false, off},
		"privileged":               {nil, "", true, off},
		"privileged and default":   {&runtimeapi.SecurityProfile{}, "", true, off},
		"privileged and localhost": {local, "", true, off},
		"privileged and missing":   {missing, "", true, off},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := n.podConfig(t)
			cfg.Linux.SecurityContext.Privileged = c.privileged
			cfg.Linux.SecurityContext.Seccomp = c.profile
			cfg.Linux.SecurityContext.SeccompProfilePath = c.path //nolint:staticcheck // field of old kubelets
			pod := n.runPod(t, cfg)
			if got := n.procStatus(t, pod, "Seccomp"); got != c.want {
				t.Errorf("pause: mode %s, want %s", got, c.want)
			}

			cc := n.containerConfig(sh("sleep 1000"))
			cc.Linux.SecurityContext.Privileged = c.privileged
			cc.Linux.SecurityContext.Seccomp = c.profile
			cc.Linux.SecurityContext.SeccompProfilePath = c.path //nolint:staticcheck // field of old kubelets
			id := n.startConfig(t, pod, cfg, cc)
			if got := n.procStatus(t, id, "Seccomp"); got != c.want {
				t.Errorf("container: mode %s, want %s", got, c.want)
			}

			got := strings.TrimSpace(n.exec(t, id, "sh", "-c", "grep Seccomp: /proc/self/status | cut -f2"))
			if got != c.want {
				t.Errorf("exec: mode %s, want %s", got, c.want)
			}
		})
	}
}

// execSemantics checks that a missing or non-executable command ends with a shell's exit code and
// the engine's text on stderr, as probes and kubectl expect.
func execSemantics(t *testing.T, n *node) {
	cfg := n.podConfig(t)
	cc := n.containerConfig(sh("mkdir -p /directory; echo x > /plain; sleep 1000"))
	id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
	eventually(t, "creation of the files", func() bool {
		return strings.Contains(n.exec(t, id, "ls", "/"), "plain")
	})

	for _, c := range []struct {
		cmd  string
		code int32
	}{
		{"/no/such", 127},
		{"no-such-command", 127},
		{"/plain/x", 127},
		{"/plain", 126},
		{"/directory", 126},
	} {
		t.Run(c.cmd, func(t *testing.T) {
			r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
				ContainerId: id,
				Cmd:         []string{c.cmd, "arg"},
				Timeout:     20,
			})
			if err != nil || r.ExitCode != c.code || len(r.Stdout) > 0 || strings.Count(string(r.Stderr), c.cmd) < 1 {
				t.Errorf("ExecSync: %v, %v, want exit code %d", r, err, c.code)
			}

			if lines := strings.Count(string(r.GetStderr()), "\n"); lines != 1 {
				t.Errorf("ExecSync: %d lines on stderr, want 1: %q", lines, r.GetStderr())
			}

			for _, tty := range []bool{false, true} {
				out := map[bool]byte{false: 2, true: 1}[tty]
				x, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
					ContainerId: id,
					Cmd:         []string{c.cmd},
					Stdout:      true,
					Stderr:      !tty,
					Tty:         tty,
				})
				if err != nil {
					t.Fatal(err)
				}

				got := collect(t, n.stream(t, x.Url), 3, "}")
				if !strings.Contains(got[out], c.cmd) || !tty && got[1] != "" ||
					!strings.Contains(got[3], fmt.Sprintf(`"%d"`, c.code)) {
					t.Errorf("Exec, TTY %t: %q, want exit code %d", tty, got, c.code)
				}
			}
		})
	}

	// A command that prints the same text and exits with the same code.
	const text = "OCI runtime exec failed: exec failed: exec: \"sh\": executable file not found\r\n"
	r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id,
		Cmd:         []string{"sh", "-c", "printf '%s' '" + text + "'; exit 127"},
		Timeout:     20,
	})
	if err != nil || r.ExitCode != 127 || string(r.Stdout) != text || len(r.Stderr) > 0 {
		t.Errorf("command that prints the engine's text: %v, %v", r, err)
	}

	execWithoutWorkingDir(t, n)
}

// execWithoutWorkingDir checks that another failure of the start is an error, here of a missing
// working directory.
func execWithoutWorkingDir(t *testing.T, n *node) {
	cfg := n.podConfig(t)
	cc := n.containerConfig(sh("cd /; rmdir /srv/here; sleep 1000"))
	cc.WorkingDir = "/srv/here"
	id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
	eventually(t, "removal of the directory", func() bool {
		r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"true"},
			Timeout:     20,
		})
		return err != nil && strings.Contains(err.Error(), "/srv/here") && r == nil
	})
}

// failedStartSemantics checks the status of a container after a failed start: recent times, and a
// matching reason and exit code.
func failedStartSemantics(t *testing.T, n *node) {
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	file := filepath.Join(n.tempDir(t), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		change func(*runtimeapi.ContainerConfig)
		code   int32 // 0: any nonzero code
	}{
		"missing":    {func(cc *runtimeapi.ContainerConfig) { cc.Command = []string{"/no/such"} }, 127},
		"executable": {func(cc *runtimeapi.ContainerConfig) { cc.Command = []string{"/etc/passwd"} }, 126},
		"user":       {func(cc *runtimeapi.ContainerConfig) { cc.Linux.SecurityContext.RunAsUsername = "nobody9" }, 0},
		"mount": {func(cc *runtimeapi.ContainerConfig) {
			cc.Mounts = []*runtimeapi.Mount{{HostPath: file, ContainerPath: "/etc"}}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now().Add(-time.Minute).UnixNano()
			cc := n.containerConfig(sh("true"))
			cc.Metadata.Name = name
			cc.LogPath = name + ".log"
			c.change(cc)
			id := n.create(t, pod, cfg, cc)
			if _, err := n.Runtime.StartContainer(t.Context(),
				&runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
				t.Fatal("StartContainer succeeded")
			}

			s := n.containerStatus(t, id)
			if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.CreatedAt < begin || s.StartedAt < begin ||
				s.FinishedAt < s.StartedAt {
				t.Errorf("state and times of %v", s)
			}

			if s.Reason != "ContainerCannotRun" || s.ExitCode == 0 || c.code != 0 && s.ExitCode != c.code ||
				s.Message == "" {
				t.Errorf("reason and exit code of %v, want exit code %d", s, c.code)
			}
		})
	}
}

// memorySemantics checks that -1 removes a limit, and that a limit below Docker's minimum is raised
// to it.
func memorySemantics(t *testing.T, n *node) {
	const mib = 1 << 20
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	limitOf := func(id string) string {
		return strings.TrimSpace(n.readCgroup(t, id, "memory/memory.limit_in_bytes", "memory.max"))
	}
	isUnlimited := func(id string) bool {
		l := limitOf(id)
		return l == "max" || len(l) == len("9223372036854771712")
	}

	statusOf := func(id string) int64 {
		return n.containerStatus(t, id).GetResources().GetLinux().GetMemoryLimitInBytes()
	}

	start := func(name string, r *runtimeapi.LinuxContainerResources) string {
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Metadata.Name, cc.LogPath, cc.Linux.Resources = name, name+".log", r
		return n.startConfig(t, pod, cfg, cc)
	}

	id := start("lifted", &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 * mib})
	for _, step := range []struct{ limit, want int64 }{{-1, -1}, {96 * mib, 96 * mib}, {-1, -1}, {mib, 6 * mib}} {
		n.update(t, id, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: step.limit})
		if step.want < 0 && !isUnlimited(id) || step.want > 0 && limitOf(id) != fmt.Sprint(step.want) {
			t.Errorf("update to %d: cgroup has %s", step.limit, limitOf(id))
		}
		if swap := n.containerStatus(t, id).Resources.Linux.MemorySwapLimitInBytes; swap != step.want {
			t.Errorf("update to %d: status has %d for memory and swap, want %d", step.limit, swap, step.want)
		}
		if got := statusOf(id); got != step.want {
			t.Errorf("update to %d: status has %d, want %d", step.limit, got, step.want)
		}
	}

	id = start("unlimited", &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1, MemorySwapLimitInBytes: -1})
	if !isUnlimited(id) {
		t.Errorf("created with -1: cgroup has %s", limitOf(id))
	}

	id = start("small", &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 4 * mib})
	if limitOf(id) != fmt.Sprint(6*mib) || statusOf(id) != 6*mib {
		t.Errorf("created with 4 MiB: cgroup has %s, status %d, want 6 MiB", limitOf(id), statusOf(id))
	}

	if b, err := os.ReadFile(n.Log()); err != nil ||
		!strings.Contains(string(b), "memory limit of 4194304 bytes raised to 6291456") {
		t.Errorf("log lacks the warning: %v", err)
	}

	cc := n.containerConfig(sh("true"))
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes:     64 * mib,
		MemorySwapLimitInBytes: 32 * mib,
	}

	assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.linux.resources.memory_swap_limit_in_bytes")
}

// mountPathSemantics checks that ".." in the paths of a mount is resolved.
func mountPathSemantics(t *testing.T, n *node) {
	cfg := n.podConfig(t)
	dir := n.tempDir(t)
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Mounts = []*runtimeapi.Mount{{HostPath: dir + "/other/../new//here", ContainerPath: "/opt/app/../conf/"}}
	id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
	n.exec(t, id, "sh", "-c", "echo x > /opt/conf/file && [ ! -e /opt/app ]")
	if _, err := os.Stat(filepath.Join(dir, "new/here/file")); err != nil {
		t.Error(err)
	}

	m := n.containerStatus(t, id).Mounts
	if len(m) != 1 || m[0].ContainerPath != "/opt/conf" || m[0].HostPath != filepath.Join(dir, "new/here") {
		t.Errorf("mounts in the status: %v", m)
	}
}

// cdiSemantics requests devices by annotation. Without CDI support the container is refused.
func cdiSemantics(t *testing.T, n *node) {
	n.run(t, "sh", "-c", `mkdir -p /var/run/cdi && cat > /var/run/cdi/annotated.json <<'X'
{"cdiVersion": "0.5.0", "kind": "example.org/annotated", "devices": [
 {"name": "one", "containerEdits": {"env": ["ONE=yes"]}},
 {"name": "two", "containerEdits": {"env": ["TWO=yes"]}}]}
X`)
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Annotations = map[string]string{"cdi.k8s.io/plugin_9f43": "example.org/annotated=one,example.org/annotated=two"}
	if !strings.Contains(n.docker(t, "info", "-f", "{{json .}}"), `"CDISpecDirs":["`) {
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.annotations")
		return
	}

	cc.CDIDevices = []*runtimeapi.CDIDevice{{Name: "example.org/annotated=one"}}
	got := n.exec(t, n.startConfig(t, pod, cfg, cc), "cat", "/proc/1/environ")
	if !strings.Contains(got, "ONE=yes") || !strings.Contains(got, "TWO=yes") {
		t.Errorf("environment lacks the edits of the devices: %q", got)
	}

	for _, bad := range []string{"", "one", "example.org/annotated=one, example.org/annotated=two", "/dev/null"} {
		cc := n.containerConfig(sh("true"))
		cc.Metadata.Name = "bad"
		cc.Annotations = map[string]string{"cdi.k8s.io/plugin": bad}
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.annotations")
	}
}

// imageVolumeSemantics checks that a writable volume or a missing sub-path is refused, and that the
// status has the digest.
func imageVolumeSemantics(t *testing.T, n *node) {
	image := n.volumeImage(t, 2)
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	writable := n.withImage("writable", image, "")
	writable.Mounts[0].Readonly = false
	assertInvalidArgument(t, n.createErr(t, pod, cfg, writable), "config.mounts[0].readonly")

	for i, missing := range []string{"missing", "dir/missing", "base/x", "missing/dir/"} {
		cc := n.withImage(fmt.Sprint("missing", i), image, missing)
		r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if err == nil { // the engine may report the error at the start
			_, err = n.Runtime.StartContainer(t.Context(),
				&runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
		}

		if err == nil {
			t.Errorf("sub-path %s was accepted", missing)
		}
	}

	m := n.containerStatus(t, n.startConfig(t, pod, cfg, n.withImage("digest", image, "dir"))).Mounts
	digests := n.imageStatus(t, image).RepoDigests
	if len(m) != 1 || len(digests) == 0 || m[0].GetImage().GetImageRef() != digests[0] {
		t.Errorf("mounts in the status: %v, want digest %v", m, digests)
	}
}

// umaskSemantics checks that missing host paths are created readable for all, with any umask of the
// daemon.
func umaskSemantics(t *testing.T, n *node) {
	running := n.Program + "-running"
	if err := os.Rename(running, running+"-wrapped"); err != nil {
		t.Fatal(err)
	}

	script := fmt.Sprintf("#!/bin/sh\numask 077\nexec %s-wrapped \"$@\"\n", running)
	engines.WriteProgram(t, running, script)
	n.Kill(t)
	n.Restart(t)

	cfg := n.podConfig(t)
	dir := n.tempDir(t)
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Mounts = []*runtimeapi.Mount{{HostPath: filepath.Join(dir, "above/missing"), ContainerPath: "/missing"}}
	n.startConfig(t, n.runPod(t, cfg), cfg, cc)
	for _, path := range []string{"above", "above/missing"} {
		st, err := os.Stat(filepath.Join(dir, path))
		if err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v; want mode 0755", path, st, err)
		}
	}
}
