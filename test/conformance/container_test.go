package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainerLifecycle takes a container through its lifecycle and checks the status after each
// step.
func TestContainerLifecycle(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("echo to stdout; echo to stderr >&2; exit 7"))
		cc.Labels = map[string]string{"io.kubernetes.container.name": "main", "tier": "front"}
		cc.Annotations = map[string]string{"io.kubernetes.container.hash": "1a2b"}
		id := n.create(t, pod, cfg, cc)

		s := n.containerStatus(t, id)
		if s.State != runtimeapi.ContainerState_CONTAINER_CREATED || s.StartedAt != 0 || s.FinishedAt != 0 ||
			s.CreatedAt == 0 {
			t.Errorf("status of a created container: %v", s)
		}

		if s.Labels["tier"] != "front" || s.Annotations["io.kubernetes.container.hash"] != "1a2b" ||
			s.Metadata.Name != "main" {
			t.Errorf("labels %v, annotations %v, metadata %v", s.Labels, s.Annotations, s.Metadata)
		}

		n.startID(t, id)
		s = n.waitExited(t, id)
		if s.ExitCode != 7 || s.Reason != "Error" || s.FinishedAt < s.StartedAt || s.StartedAt < s.CreatedAt {
			t.Errorf("status of an exited container: %v", s)
		}

		image, err := n.Image.ImageStatus(t.Context(),
			&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: n.image}})
		if err != nil || s.ImageId != image.GetImage().GetId() || s.ImageRef != s.ImageId &&
			!slices.Contains(image.Image.RepoDigests, s.ImageRef) || s.ImageRef == "" {
			t.Errorf("image_ref %q, image_id %q, ImageStatus %v, %v", s.ImageRef, s.ImageId, image, err)
		}

		if got := n.log(t, s.LogPath); !strings.Contains(got, "to stdout") || !strings.Contains(got, "to stderr") {
			t.Errorf("log: %s", got)
		}

		if _, err := n.Runtime.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: id}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("second start: %v, want FailedPrecondition", err)
		}

		for range 2 {
			if _, err := n.Runtime.RemoveContainer(t.Context(),
				&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
				t.Errorf("RemoveContainer: %v", err)
			}
		}
	})
}

// TestCompleted checks the reason of an exit with code 0.
func TestCompleted(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		if s := n.waitExited(t, n.start(t, pod, cfg, sh("true"))); s.ExitCode != 0 || s.Reason != "Completed" {
			t.Errorf("status: %v, want exit code 0 and reason Completed", s)
		}
	})
}

// TestCannotRun starts a missing program: the start fails and the container has exited.
func TestCannotRun(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig([]string{"/no/such/program"})
		id := n.create(t, pod, cfg, cc)
		if _, err := n.Runtime.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
			t.Fatal("StartContainer of a missing program succeeded")
		}

		s := n.containerStatus(t, id)
		if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.Reason != "ContainerCannotRun" ||
			s.ExitCode == 0 || s.Message == "" {
			t.Errorf("status: %v, want exited with reason ContainerCannotRun and a message", s)
		}

		l, err := n.Runtime.ListContainers(t.Context(),
			&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
		if err != nil || len(l.Containers) != 1 || l.Containers[0].State != s.State {
			t.Errorf("ListContainers: %v, %v; want the state of the status", l, err)
		}
	})
}

// TestOOMKilled exceeds the memory limit of a container.
func TestOOMKilled(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("x=aaaaaaaaaaaaaaaa; while true; do x=$x$x; done"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
		if s := n.waitExited(t, n.startConfig(t, pod, cfg, cc)); s.Reason != "OOMKilled" || s.ExitCode != 137 {
			t.Errorf("status: %v, want exit code 137 and reason OOMKilled", s)
		}
	})
}

// TestProcess checks arguments, environment and working directory.
func TestProcess(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh(`echo "$0 $1 $GREETING in $(pwd)"`))
		cc.Args = []string{"zero", "one"}
		cc.Envs = []*runtimeapi.KeyValue{{Key: "GREETING", Value: []byte("two words = fine")}}
		cc.WorkingDir = "/made/by/engine"
		s := n.waitExited(t, n.startConfig(t, pod, cfg, cc))
		if got := n.log(t, s.LogPath); !strings.Contains(got, "zero one two words = fine in /made/by/engine") {
			t.Errorf("log: %s", got)
		}
	})
}

// TestMounts checks bind mounts from inside, from the host and in the status.
func TestMounts(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		dir := n.tempDir(t)
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}

		missing := filepath.Join(dir, "made", "when", "missing")
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Mounts = []*runtimeapi.Mount{
			{HostPath: dir, ContainerPath: "/rw"},
			{HostPath: dir, ContainerPath: "/ro", Readonly: true},
			{HostPath: filepath.Join(dir, "file"), ContainerPath: "/etc/file", Readonly: true},
			{HostPath: missing, ContainerPath: "/made"},
			{
				HostPath:      dir,
				ContainerPath: "/slave",
				Propagation:   runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
			},
		}

		id := n.startConfig(t, pod, cfg, cc)
		n.exec(t, id, "sh", "-c", "echo new > /rw/new && echo m > /made/m")
		got := n.exec(t, id, "sh", "-c", "cat /etc/file /ro/new; touch /ro/x 2>/dev/null || echo read-only")
		if got != "contentnew\nread-only\n" {
			t.Errorf("mounts: %q", got)
		}

		if b, err := os.ReadFile(filepath.Join(missing, "m")); err != nil || string(b) != "m\n" {
			t.Errorf("file below the created host path: %q, %v", b, err)
		}

		want := map[string]*runtimeapi.Mount{}
		for _, m := range cc.Mounts {
			want[m.ContainerPath] = m
		}

		mounts := n.containerStatus(t, id).Mounts
		if len(mounts) != len(want) {
			t.Errorf("status has %d mounts, want %d: %v", len(mounts), len(want), mounts)
		}

		for _, m := range mounts {
			w := want[m.ContainerPath]
			if w == nil || m.HostPath != w.HostPath || m.Readonly != w.Readonly || m.Propagation != w.Propagation {
				t.Errorf("mount in the status: %v, requested %v", m, w)
			}
		}
	})
}

// TestUser checks user, groups, capabilities and the read-only root file system.
func TestUser(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		sc := cc.Linux.SecurityContext
		sc.RunAsUser, sc.RunAsGroup = &runtimeapi.Int64Value{Value: 65534}, &runtimeapi.Int64Value{Value: 4242}
		sc.SupplementalGroups = []int64{1234, 5678}
		sc.ReadonlyRootfs = true
		sc.NoNewPrivs = true
		sc.Capabilities = &runtimeapi.Capability{
			DropCapabilities: []string{"ALL"},
			AddCapabilities:  []string{"NET_BIND_SERVICE"},
		}

		id := n.startConfig(t, pod, cfg, cc)
		st := n.exec(t, id, "cat", "/proc/1/status")
		for _, want := range []string{"Uid:\t65534", "Gid:\t4242", "1234 ", "5678 ", "NoNewPrivs:\t1",
			"CapBnd:\t0000000000000400"} {
			if !strings.Contains(st, want) {
				t.Errorf("the process lacks %q:\n%s", want, st)
			}
		}

		if got := n.exec(t, id, "sh", "-c", "touch /x 2>/dev/null || echo read-only"); got != "read-only\n" {
			t.Errorf("root file system: %q", got)
		}
	})
}

// TestSeccomp checks the three types of seccomp profiles.
func TestSeccomp(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		profile := filepath.Join(n.tempDir(t), "no-mkdir.json")
		if err := os.WriteFile(profile,
			[]byte(`{"defaultAction":"SCMP_ACT_ALLOW",`+
				`"syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
			t.Fatal(err)
		}

		for _, c := range []struct {
			profile     *runtimeapi.SecurityProfile
			mode, mkdir string
		}{
			{
				profile: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
				mode:    "Seccomp:\t2\n",
				mkdir:   "created",
			},
			{
				profile: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined},
				mode:    "Seccomp:\t0\n",
				mkdir:   "created",
			},
			{
				profile: &runtimeapi.SecurityProfile{
					ProfileType:  runtimeapi.SecurityProfile_Localhost,
					LocalhostRef: profile,
				},
				mode:  "Seccomp:\t2\n",
				mkdir: "refused",
			},
		} {
			t.Run(c.profile.ProfileType.String(), func(t *testing.T) {
				script := "cat /proc/self/status; mkdir /d 2>/dev/null && echo created || echo refused"
				cc := n.containerConfig(sh(script))
				cc.Metadata.Name = strings.ToLower(c.profile.ProfileType.String())
				cc.LogPath = cc.Metadata.Name + ".log"
				cc.Linux.SecurityContext.Seccomp = c.profile
				s := n.waitExited(t, n.startConfig(t, pod, cfg, cc))
				if got := n.log(t, s.LogPath); !strings.Contains(got, c.mode) || !strings.Contains(got, c.mkdir) {
					t.Errorf("%v: want %q and %q in:\n%s", c.profile, c.mode, c.mkdir, got)
				}
			})
		}
	})
}

// TestPrivileged mounts a file system in a privileged container.
func TestPrivileged(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.Privileged = true
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.Privileged = true
		id := n.startConfig(t, pod, cfg, cc)
		n.exec(t, id, "sh", "-c", "mkdir /m && mount -t tmpfs none /m && umount /m")
	})
}

// TestStopContainer stops containers that handle SIGTERM, ignore it, or get no grace period.
func TestStopContainer(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		stop := func(id string, grace int64) {
			t.Helper()
			if _, err := n.Runtime.StopContainer(t.Context(),
				&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
				t.Fatal(err)
			}
		}

		graceful := n.startNamed(t, pod, cfg, "graceful",
			sh("trap 'exit 3' TERM; echo ready; while true; do sleep 0.1; done"))
		eventually(t, "set trap", func() bool {
			return strings.Contains(n.log(t, n.containerStatus(t, graceful).LogPath), "ready")
		})
		stop(graceful, 10)
		if s := n.containerStatus(t, graceful); s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			s.ExitCode != 3 {
			t.Errorf("status after a graceful stop: %v", s)
		}

		stop(graceful, 10)
		ignoring := n.startNamed(t, pod, cfg, "ignoring", sh("trap '' TERM; while true; do sleep 0.1; done"))
		stop(ignoring, 1)
		if s := n.containerStatus(t, ignoring); s.ExitCode != 137 {
			t.Errorf("status after a stop past the grace period: %v", s)
		}

		killed := n.startNamed(t, pod, cfg, "killed", sh("trap 'exit 3' TERM; echo ready; sleep 1000 & wait"))
		eventually(t, "set trap", func() bool {
			return strings.Contains(n.log(t, n.containerStatus(t, killed).LogPath), "ready")
		})
		stop(killed, 0)
		if s := n.containerStatus(t, killed); s.ExitCode != 137 {
			t.Errorf("status after a stop with timeout 0: %v", s)
		}
	})
}

// TestListContainers checks every field of the filter.
func TestListContainers(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Labels = map[string]string{"uid": cfg.Metadata.Uid}
		running := n.startConfig(t, pod, cfg, cc)
		second := n.containerConfig(sh("true"))
		second.Metadata.Name, second.LogPath = "second", "second_0.log"
		second.Labels = map[string]string{"uid": cfg.Metadata.Uid, "n": "2"}
		ended := n.startConfig(t, pod, cfg, second)
		n.waitExited(t, ended)

		for name, c := range map[string]struct {
			filter *runtimeapi.ContainerFilter
			want   []string
		}{
			"pod":        {&runtimeapi.ContainerFilter{PodSandboxId: pod}, []string{ended, running}},
			"pod prefix": {&runtimeapi.ContainerFilter{PodSandboxId: pod[:12]}, []string{ended, running}},
			"running": {&runtimeapi.ContainerFilter{
				PodSandboxId: pod,
				State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			}, []string{running}},
			"exited": {&runtimeapi.ContainerFilter{
				PodSandboxId: pod,
				State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED},
			}, []string{ended}},
			"labels": {&runtimeapi.ContainerFilter{
				LabelSelector: map[string]string{"uid": cfg.Metadata.Uid, "n": "2"},
			}, []string{ended}},
			"id prefix":   {&runtimeapi.ContainerFilter{Id: running[:11]}, []string{running}},
			"sandbox ids": {&runtimeapi.ContainerFilter{Id: pod}, nil},
		} {
			t.Run(name, func(t *testing.T) {
				r, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: c.filter})
				if err != nil {
					t.Fatal(err)
				}

				var got []string
				for _, p := range r.Containers {
					got = append(got, p.Id)
				}

				if fmt.Sprint(got) != fmt.Sprint(c.want) {
					t.Errorf("got %v, want %v", got, c.want)
				}
			})
		}
	})
}

// TestContainerOfAnUnknownImageOrPod checks the codes for a missing image and a stopped pod.
func TestContainerOfAnUnknownImageOrPod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("true"))
		cc.Image = &runtimeapi.ImageSpec{Image: "not/there:1"}
		if _, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		}); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "not/there:1") {
			t.Errorf("container of a missing image: %v, want NotFound", err)
		}

		n.stopPod(t, pod)
		cc.Image = &runtimeapi.ImageSpec{Image: n.image}
		if _, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("container in a stopped pod: %v, want FailedPrecondition", err)
		}
	})
}
