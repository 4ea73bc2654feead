package translate

import (
	"fmt"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestSandboxUserNamespace checks that with userns-remap only pods with a namespace of the node and
// privileged pods run in the node's user namespace.
func TestSandboxUserNamespace(t *testing.T) {
	const node = runtimeapi.NamespaceMode_NODE
	plain, mapping := hosts["20.10"], hosts["20.10"]
	mapping.SecurityOptions = append([]string{"userns"}, plain.SecurityOptions...)
	for name, test := range map[string]struct {
		sc   *runtimeapi.LinuxSandboxSecurityContext
		host bool
	}{
		"empty": {nil, false},
		"pod":   {&runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}}, false},
		"network": {&runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Network: node},
		}, true},
		"PIDs": {&runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: node},
		}, true},
		"IPC": {&runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Ipc: node},
		}, true},
		"privileged": {&runtimeapi.LinuxSandboxSecurityContext{Privileged: true}, true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &runtimeapi.PodSandboxConfig{
				Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"},
				Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: test.sc},
			}

			for _, h := range []model.Host{plain, mapping} {
				c, err := NewSandbox(cfg, SandboxOptions{Host: h, NetworkMode: "none"})
				if err != nil {
					t.Fatal(err)
				}

				if got, want := c.Host.UsernsMode.IsHost(), test.host && h.MapsUsers(); got != want {
					t.Errorf("engine maps users: %v: node's user namespace: %v, want %v", h.MapsUsers(), got, want)
				}
				if c.Host.Init == nil || *c.Host.Init {
					t.Error("the engine may run the pause process below its own init")
				}
			}
		})
	}
}

// TestContainerJoinsUserNamespace checks that a container uses the user namespace of its sandbox.
func TestContainerJoinsUserNamespace(t *testing.T) {
	pod := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}}
	for _, hostUsers := range []bool{false, true} {
		t.Run(fmt.Sprintf("host users %v", hostUsers), func(t *testing.T) {
			sb := &model.Sandbox{
				ID:        "0123",
				Name:      SandboxName(pod.Metadata),
				Metadata:  pod.Metadata,
				HostUsers: hostUsers,
			}
			cfg := &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
				Command:  []string{"true"},
			}
			c, err := NewContainer(cfg, pod, ContainerOptions{Host: hosts["20.10"], Sandbox: sb, Image: &model.Image{}})
			if err != nil {
				t.Fatal(err)
			}

			if c.Host.UsernsMode.IsHost() != hostUsers || c.Host.Init != nil {
				t.Errorf("user namespace %q, init %v", c.Host.UsernsMode, c.Host.Init)
			}
		})
	}
}
