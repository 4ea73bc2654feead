package validate

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// rule is a change of a valid configuration, and the field of the error for it; "" for none.
type rule[T any] struct {
	change func(T)
	field  string
}

func TestContainerRules(t *testing.T) {
	tests := map[string]rule[*runtimeapi.ContainerConfig]{
		"no metadata": {func(c *runtimeapi.ContainerConfig) { c.Metadata = nil }, "config.metadata"},
		"pause":       {func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "POD" }, "config.metadata.name"},
		"Windows": {func(c *runtimeapi.ContainerConfig) {
			c.Windows = &runtimeapi.WindowsContainerConfig{}
		}, "config.windows"},
		"no image":      {func(c *runtimeapi.ContainerConfig) { c.Image.Image = "" }, "config.image.image"},
		"image with ..": {func(c *runtimeapi.ContainerConfig) { c.Image.Image = "a/../b" }, "config.image.image"},
		"long image": {func(c *runtimeapi.ContainerConfig) {
			c.Image.Image = strings.Repeat("a", 2000)
		}, "config.image.image"},
		"log":            {func(c *runtimeapi.ContainerConfig) { c.LogPath = "main/0.log" }, ""},
		"absolute log":   {func(c *runtimeapi.ContainerConfig) { c.LogPath = "/main" }, "config.log_path"},
		"log outside":    {func(c *runtimeapi.ContainerConfig) { c.LogPath = "a/../../b" }, "config.log_path"},
		"NUL in command": {func(c *runtimeapi.ContainerConfig) { c.Command = []string{"a\x00"} }, "config.command[0]"},
		"invalid UTF-8":  {func(c *runtimeapi.ContainerConfig) { c.Args = []string{"a", "\xff"} }, "config.args[1]"},
		"stop signal":    {func(c *runtimeapi.ContainerConfig) { c.StopSignal = 9999 }, "config.stop_signal"},
		"empty label key": {func(c *runtimeapi.ContainerConfig) {
			c.Labels = map[string]string{"": "x"}
		}, "config.labels"},
		"environment": {func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b=c")}}
		}, ""},
		"environment without a key": {func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Value: []byte("secret")}}
		}, "config.envs[0].key"},
		"relative device": {func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "dev/x", ContainerPath: "/dev/x"}}
		}, "config.devices[0].host_path"},
		"device permissions": {func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/x", ContainerPath: "/dev/x", Permissions: "rx"}}
		}, "config.devices[0].permissions"},
		"CDI device": {func(c *runtimeapi.ContainerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "/dev/gpu"}}
		}, "config.CDI_devices"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := container()
			test.change(r.Config)
			checkField(t, Request(r), test.field)
		})
	}
}

// TestEnvironmentIsSecret checks that errors do not contain the value of a variable.
func TestEnvironmentIsSecret(t *testing.T) {
	for name, env := range map[string]*runtimeapi.KeyValue{
		"value in the key": {Key: "TOKEN=s3cret"},
		"invalid value":    {Key: "TOKEN", Value: []byte("s3cret\x00")},
	} {
		t.Run(name, func(t *testing.T) {
			r := container()
			r.Config.Envs = []*runtimeapi.KeyValue{env}
			err := Request(r)
			if err == nil || strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "TOKEN") {
				t.Errorf("error %v, want one with the name only", err)
			}
		})
	}
}

func TestContainerSecurityRules(t *testing.T) {
	const field = "config.linux.security_context"
	tests := map[string]rule[*runtimeapi.LinuxContainerSecurityContext]{
		"capability": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		}, ""},
		"invalid capability": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"a b"}}
		}, field + ".capabilities[0]"},
		"ambient capability": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_ADMIN"}}
		}, ""},
		"invalid ambient capability": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"a b"}}
		}, field + ".capabilities[0]"},
		"strict groups": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			sc.SupplementalGroups = []int64{0, 1<<32 - 1}
		}, ""},
		"strict group out of range": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			sc.SupplementalGroups = []int64{0, 1 << 32}
		}, field + ".supplemental_groups[1]"},
		"negative user": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUser = &runtimeapi.Int64Value{Value: -1}
		}, field + ".run_as_user"},
		"group of a user name": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUsername, sc.RunAsGroup = "web", &runtimeapi.Int64Value{Value: 1}
		}, ""},
		"target without an ID": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET}
		}, field + ".namespace_options.target_id"},
		"network of a container": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_CONTAINER}
		}, field + ".namespace_options.network"},
		"user namespace": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{}}
		}, field + ".namespace_options.userns_options.uids"},
		"profile without a file": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost}
		}, field + ".seccomp.localhost_ref"},
		"profile string without a file": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.ApparmorProfile = "localhost/" //nolint:staticcheck // old kubelets
		}, field + ".apparmor_profile"},
		"profile with nothing but the prefix": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor = localhostProfile("localhost/")
		}, field + ".apparmor.localhost_ref"},
		"no profile by the name of one": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor = localhostProfile("unconfined")
		}, field + ".apparmor"},
		"no profile by the name of one, with prefix": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor = localhostProfile("localhost/unconfined")
		}, field + ".apparmor"},
		"no profile by the name of one, as a string": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.ApparmorProfile = "localhost/unconfined" //nolint:staticcheck // old kubelets
		}, field + ".apparmor_profile"},
		"Unconfined": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
		}, ""},
		"unknown profile string": {func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SeccompProfilePath = "default" //nolint:staticcheck // old kubelets
		}, field + ".seccomp_profile_path"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := container()
			test.change(r.Config.Linux.SecurityContext)
			checkField(t, Request(r), test.field)
		})
	}
}

func localhostProfile(ref string) *runtimeapi.SecurityProfile {
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
}
