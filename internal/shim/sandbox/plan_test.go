package sandbox

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/internal/shim/bundle"
)

// newBundle returns the bundle of a plain pause.
func newBundle() *bundle.Bundle {
	return &bundle.Bundle{
		Dir:  "/run/bundle",
		Want: annotation.Container{Sandbox: &annotation.Sandbox{NetNS: "/run/netns/a"}},
		Spec: &specs.Spec{
			Root:     &specs.Root{Path: "/var/lib/docker/x"},
			Hostname: "web-0",
			Process:  &specs.Process{Args: []string{"/pause"}, NoNewPrivileges: true},
			Linux: &specs.Linux{
				CgroupsPath: "/kubepods/pod1/bundle",
				Namespaces: []specs.LinuxNamespace{
					{Type: specs.MountNamespace}, {Type: specs.UTSNamespace}, {Type: specs.IPCNamespace},
					{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace, Path: "/run/docker/netns/default"},
				},
			},
		},
	}
}

func TestNewPlan(t *testing.T) {
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID
	p, reason := NewPlan(newBundle())
	if reason != "" || p.netns != "/run/netns/a" || p.hostname != "web-0" || p.flags != all {
		t.Errorf("plan %+v, reason %q", p, reason)
	}

	host := newBundle() // shares the node's namespaces
	host.Want.Sandbox.NetNS = ""
	for path, namespaces := range map[string][]specs.LinuxNamespace{
		"":                          {{Type: specs.MountNamespace}},
		"/run/docker/netns/default": {{Type: specs.MountNamespace}, host.Spec.Linux.Namespaces[4]},
	} {
		host.Spec.Linux.Namespaces = namespaces
		p, reason = NewPlan(host)
		if reason != "" || p.netns != path || p.hostname != "" || p.flags != unix.CLONE_NEWNS {
			t.Errorf("plan %+v, reason %q", p, reason)
		}
	}
}

// TestNewPlanRejects checks that every property without an implementation here goes to runc.
func TestNewPlanRejects(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec, *annotation.Container){
		"no pause":       func(_ *specs.Spec, w *annotation.Container) { w.Sandbox = nil },
		"relative root":  func(s *specs.Spec, _ *annotation.Container) { s.Root.Path = "rootfs" },
		"relative path":  func(s *specs.Spec, _ *annotation.Container) { s.Process.Args = []string{"pause"} },
		"hooks":          func(s *specs.Spec, _ *annotation.Container) { s.Hooks = &specs.Hooks{} },
		"privileges":     func(s *specs.Spec, _ *annotation.Container) { s.Process.NoNewPrivileges = false },
		"terminal":       func(s *specs.Spec, _ *annotation.Container) { s.Process.Terminal = true },
		"SELinux":        func(s *specs.Spec, _ *annotation.Container) { s.Process.SelinuxLabel = "a" },
		"rlimits":        func(s *specs.Spec, _ *annotation.Container) { s.Process.Rlimits = []specs.POSIXRlimit{{}} },
		"other scope":    func(s *specs.Spec, _ *annotation.Container) { s.Linux.CgroupsPath = "a.slice:docker:b" },
		"no slice":       func(s *specs.Spec, _ *annotation.Container) { s.Linux.CgroupsPath = "a/b:docker:bundle" },
		"unclean cgroup": func(s *specs.Spec, _ *annotation.Container) { s.Linux.CgroupsPath = "/a/../b" },
		"other cgroup":   func(s *specs.Spec, _ *annotation.Container) { s.Linux.CgroupsPath = "/kubepods/pod1" },
		"users": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{}}
		},
		"sysctl": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Sysctl = map[string]string{"vm.x": "1"}
		},
		"sysctl path": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Sysctl = map[string]string{"kernel.shm/../../x": "1"}
		},
		"sysctl of the node": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Sysctl = map[string]string{"kernel.shmmax": "1"}
			s.Linux.Namespaces = append(s.Linux.Namespaces[:2:2], s.Linux.Namespaces[3:]...)
		},
		"user namespace": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		},
		"joined PID namespace": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Namespaces[3].Path = "/proc/1/ns/pid"
		},
		"new network namespace": func(s *specs.Spec, w *annotation.Container) {
			w.Sandbox.NetNS, s.Linux.Namespaces[4].Path = "", ""
		},
		"seccomp": func(s *specs.Spec, _ *annotation.Container) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBundle()
			change(b.Spec, &b.Want)
			if p, reason := NewPlan(b); reason == "" {
				t.Errorf("plan %+v, want a reason against it", p)
			}
		})
	}
}

// TestStateKill checks that Clean kills the process of the state file, and no other one with its
// PID.
func TestStateKill(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()

	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	const group = "/cri-dockerd-test-missing"
	if err := writeState(dir, state{Pid: cmd.Process.Pid, Start: start, Cgroup: group}); err != nil {
		t.Fatal(err)
	}

	s, err := readState(dir)
	if err != nil {
		t.Fatal(err)
	}

	other := s
	other.Start += "1"
	if err := other.kill(t.Context(), dir); err != nil || cmd.Process.Signal(unix.Signal(0)) != nil {
		t.Errorf("a process with another start time: %v, or it was killed", err)
	}

	if err := s.kill(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the process ended with %v", err)
	}

	if err := s.kill(t.Context(), dir); err != nil {
		t.Errorf("kill of an ended process: %v", err)
	}
}

// TestCleanKeepsTheExit checks that Clean reports the recorded exit of an ended pause, and kills
// nothing.
func TestCleanKeepsTheExit(t *testing.T) {
	want := Exit{7, time.Unix(1, 0).UTC()}
	dir := t.TempDir()
	cgroup := "/cri-dockerd-test-missing"
	if err := writeState(dir, state{Pid: os.Getpid(), Cgroup: cgroup, Exit: &want}); err != nil {
		t.Fatal(err)
	}

	pid, got, err := Clean(t.Context(), dir)
	if err != nil || pid != os.Getpid() || got != want {
		t.Errorf("Clean = %d, %v, %v; want %v", pid, got, err, want)
	}

	if _, _, err := Clean(t.Context(), t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Clean without a pause: %v, want os.ErrNotExist", err)
	}
}

func TestReadStateRejects(t *testing.T) {
	for name, text := range map[string]string{
		"newer version":   `{"v":2,"cgroup":"/a"}`,
		"root cgroup":     `{"v":1,"cgroup":"/"}`,
		"relative cgroup": `{"v":1,"cgroup":"a"}`,
		"unclean cgroup":  `{"v":1,"cgroup":"/a/../.."}`,
		"not JSON":        `x`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(dir+"/"+stateFile, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err := readState(dir); err == nil {
				t.Errorf("state %+v", s)
			}
		})
	}
}
