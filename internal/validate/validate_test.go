package validate

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestUnknownRequestsPass(t *testing.T) {
	for _, r := range []any{
		nil, &runtimeapi.VersionRequest{}, (*runtimeapi.StatusRequest)(nil), &runtimeapi.ListPodSandboxRequest{},
	} {
		if err := Request(r); err != nil {
			t.Errorf("%T: %v", r, err)
		}
	}
}

func pod() *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u"},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}
}

func container() *runtimeapi.CreateContainerRequest {
	return &runtimeapi.CreateContainerRequest{
		PodSandboxId: "0123456789ab",
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: "web:1"},
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
		},
		SandboxConfig: pod(),
	}
}

func TestNames(t *testing.T) {
	checkField(t, Request(&runtimeapi.RunPodSandboxRequest{Config: pod()}), "")
	checkField(t, Request(container()), "")
	for _, bad := range []string{
		"", "a_b", "a/b", "a\x00b", "a\nb", "ä", " ", "..", "-a", strings.Repeat("x", 254), "\xff",
	} {
		for field, set := range map[string]func(*runtimeapi.PodSandboxMetadata){
			"config.metadata.name":      func(m *runtimeapi.PodSandboxMetadata) { m.Name = bad },
			"config.metadata.namespace": func(m *runtimeapi.PodSandboxMetadata) { m.Namespace = bad },
			"config.metadata.uid":       func(m *runtimeapi.PodSandboxMetadata) { m.Uid = bad },
		} {
			t.Run(field+" "+bad, func(t *testing.T) {
				cfg := pod()
				set(cfg.Metadata)
				checkField(t, Request(&runtimeapi.RunPodSandboxRequest{Config: cfg}), field)
			})
		}

		t.Run("container "+bad, func(t *testing.T) {
			r := container()
			r.Config.Metadata.Name = bad
			checkField(t, Request(r), "config.metadata.name")
		})
	}
}

func TestSandboxRules(t *testing.T) {
	const node = runtimeapi.NamespaceMode_NODE
	hostNetwork := func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: node}
	}

	tests := map[string]struct {
		change func(*runtimeapi.PodSandboxConfig)
		field  string
	}{
		"sysctl": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1", "net/core/somaxconn": "1"}
		}, ""},
		"sysctl of the node": {func(c *runtimeapi.PodSandboxConfig) {
			hostNetwork(c)
			c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1"}
		}, "config.linux.sysctls[net.core.somaxconn]"},
		"sysctl of the node with slashes": {func(c *runtimeapi.PodSandboxConfig) {
			hostNetwork(c)
			c.Linux.Sysctls = map[string]string{"net/core/somaxconn": "1"}
		}, "config.linux.sysctls[net/core/somaxconn]"},
		"another sysctl on the host network": {func(c *runtimeapi.PodSandboxConfig) {
			hostNetwork(c)
			c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
		}, ""},
		"host IP": {func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 80, HostIp: "node"}}
		}, "config.port_mappings[0].host_ip"},
		"unused host IP": {func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostIp: "node"}}
		}, ""},
		"group without user": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 1}
		}, "config.linux.security_context.run_as_group"},
		"strict groups": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		}, ""},
		"strict group out of range": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			c.Linux.SecurityContext.SupplementalGroups = []int64{-1}
		}, "config.linux.security_context.supplemental_groups[0]"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := pod()
			test.change(cfg)
			checkField(t, Request(&runtimeapi.RunPodSandboxRequest{Config: cfg}), test.field)
		})
	}
}

// TestKernelLimits checks that a limit cannot name another file.
func TestKernelLimits(t *testing.T) {
	tests := []struct {
		field     string
		resources *runtimeapi.LinuxContainerResources
	}{
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"cgroup.procs": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high/../../x": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"../../memory.max": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory..high": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{
			Unified: map[string]string{strings.Repeat("a", 1<<20): "1"},
		}},
		{"linux.hugepage_limits[0].page_size", &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "../2MB"}},
		}},
		{"linux.hugepage_limits[0].page_size", &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "99999999999MB"}},
		}},
		{"linux.hugepage_limits[0].page_size", &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{nil},
		}},
		{"linux.oom_score_adj", &runtimeapi.LinuxContainerResources{OomScoreAdj: 1001}},
		{"linux.cpu_quota", &runtimeapi.LinuxContainerResources{CpuQuota: -2}},
	}

	for _, test := range tests {
		err := Request(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: test.resources})
		checkField(t, err, test.field)
		if len(err.Error()) > 1000 {
			t.Errorf("%s: the error has %d bytes", test.field, len(err.Error()))
		}
	}
}

func TestMountRules(t *testing.T) {
	image := func(change func(*runtimeapi.Mount)) *runtimeapi.Mount {
		m := &runtimeapi.Mount{ContainerPath: "/v", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "web:1"}}
		change(m)
		return m
	}

	const field = "config.mounts[0]"
	tests := map[string]struct {
		mount *runtimeapi.Mount
		field string
	}{
		"bind":     {&runtimeapi.Mount{HostPath: "/a", ContainerPath: "/v"}, ""},
		"relative": {&runtimeapi.Mount{HostPath: "a", ContainerPath: "/v"}, field + ".host_path"},
		"root":     {&runtimeapi.Mount{HostPath: "/a", ContainerPath: "/v/.."}, field + ".container_path"},
		"options":  {&runtimeapi.Mount{HostPath: "/a", ContainerPath: "/v", MountOptions: []string{"noexec"}}, ""},
		"unknown option": {
			&runtimeapi.Mount{HostPath: "/a", ContainerPath: "/v", MountOptions: []string{"nodev", "suid"}},
			field + ".mount_options[1]",
		},
		"image":            {image(func(*runtimeapi.Mount) {}), ""},
		"image, sub-path":  {image(func(m *runtimeapi.Mount) { m.ImageSubPath = "a/b" }), ""},
		"image, up":        {image(func(m *runtimeapi.Mount) { m.ImageSubPath = "../up" }), field + ".image_sub_path"},
		"image, absolute":  {image(func(m *runtimeapi.Mount) { m.ImageSubPath = "/abs" }), field + ".image_sub_path"},
		"image, host path": {image(func(m *runtimeapi.Mount) { m.HostPath = "/etc" }), field + ".host_path"},
		"image, writable":  {image(func(m *runtimeapi.Mount) { m.Readonly = false }), field + ".readonly"},
		"image, shared":    {image(func(m *runtimeapi.Mount) { m.Propagation = 1 }), field + ".propagation"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := container()
			r.Config.Mounts = []*runtimeapi.Mount{test.mount}
			checkField(t, Request(r), test.field)
		})
	}
}

func TestRequestRules(t *testing.T) {
	const id = "0123456789ab"
	long := strings.Repeat("a", maxText+1)
	tests := map[string][]any{
		"": {
			&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}},
			&runtimeapi.AttachRequest{ContainerId: id, Stdin: true},
			&runtimeapi.PortForwardRequest{PodSandboxId: id, Port: []int32{80}},
			&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30},
			&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "docker.io/library/web:1"}},
		},
		"pod_sandbox_id": {
			&runtimeapi.StopPodSandboxRequest{},
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: "../etc"},
			&runtimeapi.UpdatePodSandboxResourcesRequest{},
		},
		"container_id": {
			&runtimeapi.StartContainerRequest{ContainerId: "a b"},
			&runtimeapi.ExecRequest{ContainerId: "a?b", Cmd: []string{"true"}, Stdout: true},
		},
		"cmd":    {&runtimeapi.ExecSyncRequest{ContainerId: id}},
		"cmd[0]": {&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{""}}},
		"cmd[1]": {&runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true", long}, Stdout: true}},
		"timeout": {
			&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: -1},
			&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: -1},
		},
		"stdin, stdout, stderr": {&runtimeapi.AttachRequest{ContainerId: id}},
		"stderr":                {&runtimeapi.AttachRequest{ContainerId: id, Stderr: true, Tty: true}},
		"port[1]":               {&runtimeapi.PortForwardRequest{PodSandboxId: id, Port: []int32{80, 65536}}},
		"image.image": {
			&runtimeapi.PullImageRequest{},
			&runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "a b"}},
		},
	}

	for field, requests := range tests {
		t.Run(field, func(t *testing.T) {
			for _, r := range requests {
				checkField(t, Request(r), field)
			}
		})
	}
}

func TestPodRules(t *testing.T) {
	tests := map[string]rule[*runtimeapi.PodSandboxConfig]{
		"no metadata": {func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }, "config.metadata"},
		"hostname":    {func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "web_0" }, "config.hostname"},
		"long hostname": {func(c *runtimeapi.PodSandboxConfig) {
			c.Hostname = strings.Repeat("a", 65)
		}, "config.hostname"},
		"log directory": {func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "/a/../b" }, "config.log_directory"},
		"protocol": {func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{Protocol: 7}}
		}, "config.port_mappings[0].protocol"},
		"host port": {func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 65536}}
		}, "config.port_mappings[0].host_port"},
		"host port of no port": {func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 80}}
		}, "config.port_mappings[0].container_port"},
		"line break in DNS": {func(c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig = &runtimeapi.DNSConfig{Searches: []string{"a\nnameserver b"}}
		}, "config.dns_config.searches[0]"},
		"Windows": {func(c *runtimeapi.PodSandboxConfig) {
			c.Windows = &runtimeapi.WindowsPodSandboxConfig{}
		}, "config.windows"},
		"target": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
				Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "a",
			}
		}, "config.linux.security_context.namespace_options.pid"},
		"cgroup parent": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.CgroupParent = "/kubepods/../system.slice"
		}, "config.linux.cgroup_parent"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := pod()
			test.change(cfg)
			checkField(t, Request(&runtimeapi.RunPodSandboxRequest{Config: cfg}), test.field)
		})
	}
}
