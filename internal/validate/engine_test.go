package validate

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestUserNamespace checks that a container in a user namespace cannot be privileged or share the
// node's PIDs.
func TestUserNamespace(t *testing.T) {
	mapping := model.Host{SecurityOptions: []string{"userns"}, Runtimes: []string{"runc"}}
	privileged := &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	nodePID := &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE},
	}

	tests := map[string]struct {
		sc        *runtimeapi.LinuxContainerSecurityContext
		hostUsers bool
		field     string // of the error
	}{
		"plain":                  {nil, false, ""},
		"plain, host users":      {nil, true, ""},
		"privileged":             {privileged, false, "config.linux.security_context.privileged"},
		"privileged, host users": {privileged, true, ""},
		"node PIDs":              {nodePID, false, "config.linux.security_context.namespace_options.pid"},
		"node PIDs, host users":  {nodePID, true, ""},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := &runtimeapi.ContainerConfig{
				Command: []string{"true"},
				Linux:   &runtimeapi.LinuxContainerConfig{SecurityContext: test.sc},
			}

			err := Container(cfg, &model.Sandbox{HostUsers: test.hostUsers}, &model.Image{}, mapping)
			checkField(t, err, test.field)
		})
	}
}

// checkField fails the test unless err is InvalidArgument for a field, or nil for "".
func checkField(t *testing.T, err error, field string) {
	t.Helper()
	if field == "" && err != nil {
		t.Errorf("error %v, want none", err)
	}
	if field != "" && (!errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), field+":")) {
		t.Errorf("error %.300v, want InvalidArgument for %s", err, field)
	}
}

func TestRelabel(t *testing.T) {
	selinux := model.Host{SecurityOptions: []string{"selinux"}, APIVersion: "1.52"}
	tests := map[string]struct {
		mount *runtimeapi.Mount
		host  model.Host
		field string
	}{
		"plain": {&runtimeapi.Mount{HostPath: "/a", ContainerPath: "/b", SelinuxRelabel: true}, selinux, ""},
		"colon": {
			&runtimeapi.Mount{HostPath: "/a:b", ContainerPath: "/b", SelinuxRelabel: true},
			selinux, "config.mounts[0]",
		},
		"colon without SELinux": {
			&runtimeapi.Mount{HostPath: "/a:b", ContainerPath: "/b", SelinuxRelabel: true},
			model.Host{APIVersion: "1.52"}, "",
		},
		"recursive read-only": {
			&runtimeapi.Mount{ContainerPath: "/b", SelinuxRelabel: true, Readonly: true, RecursiveReadOnly: true},
			selinux, "config.mounts[0].recursive_read_only",
		},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := &runtimeapi.ContainerConfig{Command: []string{"true"}, Mounts: []*runtimeapi.Mount{test.mount}}
			checkField(t, Container(cfg, &model.Sandbox{}, &model.Image{}, test.host), test.field)
		})
	}
}

func TestImageVolumes(t *testing.T) {
	tests := map[string]struct {
		host model.Host
		want string // part of the error, "" for none
	}{
		"native":         {model.Host{ContainerdStore: true, APIVersion: "1.48"}, ""},
		"overlay2":       {model.Host{StorageDriver: "overlay2", APIVersion: "1.41"}, ""},
		"old containerd": {model.Host{ContainerdStore: true, APIVersion: "1.47"}, "Docker Engine 28"},
		"another driver": {model.Host{StorageDriver: "btrfs"}, "btrfs"},
		"userns-remap":   {model.Host{StorageDriver: "overlay2", SecurityOptions: []string{"userns"}}, "userns-remap"},
		"rootless":       {model.Host{StorageDriver: "overlay2", SecurityOptions: []string{"rootless"}}, "rootless"},
		"rootless native": {
			model.Host{ContainerdStore: true, APIVersion: "1.48", SecurityOptions: []string{"rootless"}}, "",
		},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := ImageVolumes(test.host)
			if test.want == "" && err != nil {
				t.Errorf("error %v, want none", err)
			}
			if test.want != "" && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error %v, want FailedPrecondition with %q", err, test.want)
			}
		})
	}
}

func TestRuntimeHandler(t *testing.T) {
	tests := map[string]struct {
		handler, api string
		isValid      bool
	}{
		"default":           {"", "1.41", true},
		"configured":        {"crun", "1.41", true},
		"missing":           {"kata", "1.52", false},
		"shim":              {"io.containerd.kata.v2", "1.42", true},
		"shim, old engine":  {"io.containerd.kata.v2", "1.41", false},
		"malformed shim":    {"io.containerd.kata/../x.v2", "1.52", false},
		"path of a program": {"/usr/bin/runc", "1.52", false},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			want := "image.runtime_handler"
			if test.isValid {
				want = ""
			}

			h := model.Host{Runtimes: []string{"crun", "runc"}, APIVersion: test.api}
			checkField(t, RuntimeHandler("image.runtime_handler", test.handler, h), want)
		})
	}
}

func TestUpdate(t *testing.T) {
	r := &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}
	checkField(t, Update(r, model.Host{CgroupVersion: "2"}), "")
	checkField(t, Update(r, model.Host{CgroupVersion: "1"}), "linux.unified")
}
