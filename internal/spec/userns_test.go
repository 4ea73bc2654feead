package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestUserNamespaces: with userns-remap, a pod that shares a namespace of the node or is privileged
// is in the node's user namespace with all its containers, and no other pod is.
func TestUserNamespaces(t *testing.T) {
	const node = runtimeapi.NamespaceMode_NODE
	plain, mapping := hosts["20.10"], hosts["20.10"]
	mapping.SecurityOptions = append([]string{"userns"}, plain.SecurityOptions...)
	for name, test := range map[string]struct {
		sc   *runtimeapi.LinuxSandboxSecurityContext
		host bool
	}{
		"nothing": {nil, false},
		"pod":     {&runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}}, false},
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
		cfg := &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"},
			Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: test.sc},
		}

		for _, h := range []Host{plain, mapping} {
			c, err := NewSandbox(cfg, SandboxOptions{Host: h, NetworkMode: "none"})
			if err != nil {
				t.Fatal(err)
			}

			if got, want := c.Host.UsernsMode.IsHost(), test.host && h.MapsUsers(); got != want {
				t.Errorf("%s, engine maps users: %v: in the node's user namespace: %v", name, h.MapsUsers(), got)
			}
			if c.Host.Init == nil || *c.Host.Init {
				t.Errorf("%s: the engine may start the pause by its own init", name)
			}
		}
	}
}

// TestUserNamespaceOfContainers: a container is in the user namespace of its sandbox, and what
// cannot run there is refused by its field.
func TestUserNamespaceOfContainers(t *testing.T) {
	mapping := hosts["20.10"]
	mapping.SecurityOptions = []string{"userns"}
	pod := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}}
	for name, test := range map[string]struct {
		sc        *runtimeapi.LinuxContainerSecurityContext
		hostUsers bool
		field     string // that is refused
	}{
		"plain":             {nil, false, ""},
		"plain, host users": {nil, true, ""},
		"privileged":        {&runtimeapi.LinuxContainerSecurityContext{Privileged: true}, true, ""},
		"privileged, mapped": {
			&runtimeapi.LinuxContainerSecurityContext{Privileged: true}, false,
			"config.linux.security_context.privileged",
		},
		"PIDs, mapped": {
			&runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE},
			},
			false, "config.linux.security_context.namespace_options.pid",
		},
	} {
		cfg := &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
			Command:  []string{"true"},
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: test.sc},
		}

		sb := &Sandbox{ID: "0123", Name: SandboxName(pod.Metadata), Metadata: pod.Metadata, HostUsers: test.hostUsers}
		c, err := NewContainer(cfg, pod, ContainerOptions{Host: mapping, Sandbox: sb, Image: &Image{}})
		switch {
		case test.field != "":
			if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), test.field+":") {
				t.Errorf("%s: %v", name, err)
			}

		case err != nil:
			t.Errorf("%s: %v", name, err)
		case c.Host.UsernsMode.IsHost() != test.hostUsers || c.Host.Init != nil:
			t.Errorf("%s: user namespace %q, init %v", name, c.Host.UsernsMode, c.Host.Init)
		}
	}
}
