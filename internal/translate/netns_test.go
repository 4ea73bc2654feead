package translate

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func netnsRequest() *runtimeapi.RunPodSandboxRequest {
	return &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			Sysctls: map[string]string{
				"net.core.somaxconn":                  "100",
				"kernel.shm_rmid_forced":              "1",
				"net.ipv4.ip_unprivileged_port_start": "1024",
			},
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}},
		},
	}}
}

func TestJoinNetNS(t *testing.T) {
	r := netnsRequest()
	c, err := NewSandbox(r.Config, SandboxOptions{NetworkMode: "none", NetNS: "/run/netns/x"})
	if err != nil {
		t.Fatal(err)
	}

	want := []mount.Mount{{Type: mount.TypeBind, Source: "/run/netns/x", Target: "/netns", ReadOnly: true}}
	if diff := cmp.Diff(want, c.Host.Mounts); diff != "" || c.Host.NetworkMode != "host" ||
		c.Config.Cmd != nil {
		t.Errorf("network mode %s, arguments %v, mounts %s", c.Host.NetworkMode, c.Config.Cmd, diff)
	}

	if diff := cmp.Diff([]string{"SETPCAP", "SYS_ADMIN"}, c.Host.CapAdd); diff != "" ||
		len(c.Host.CapDrop) != 1 || c.Host.CapDrop[0] != "ALL" {
		t.Errorf("capabilities: %s, dropped %v", diff, c.Host.CapDrop)
	}

	if diff := cmp.Diff(map[string]string{"kernel.shm_rmid_forced": "1"}, c.Host.Sysctls); diff != "" {
		t.Errorf("sysctls: %s", diff)
	}
	if len(r.Config.Linux.Sysctls) != 3 {
		t.Error("the request was changed")
	}

	sb := read(t, container.InspectResponse{
		ID:         testID,
		Name:       "/" + c.Name,
		Config:     c.Config,
		HostConfig: c.Host,
	}).Sandbox
	if sb == nil || !sb.OwnNetNS || sb.HostNetwork() {
		t.Errorf("sandbox: %+v", sb)
	}

	sc := r.Config.Linux.SecurityContext
	sc.RunAsUser, sc.SupplementalGroups = &runtimeapi.Int64Value{Value: 1000}, []int64{5, 6}
	if c, err = NewSandbox(r.Config, SandboxOptions{NetworkMode: "none", NetNS: "/run/netns/x"}); err != nil {
		t.Fatal(err)
	}

	if diff := cmp.Diff([]string{"1000", "0", "5", "6"}, []string(c.Config.Cmd)); diff != "" ||
		c.Config.User != "" || len(c.Host.GroupAdd) > 0 {
		t.Errorf("arguments %s, user %q, groups %v", diff, c.Config.User, c.Host.GroupAdd)
	}

	if diff := cmp.Diff([]string{"SETPCAP", "SYS_ADMIN", "SETGID", "SETUID"}, c.Host.CapAdd); diff != "" {
		t.Error(diff)
	}

	sc.NamespaceOptions.Network, r.Config.Linux.Sysctls = runtimeapi.NamespaceMode_NODE, nil
	if c, err = NewSandbox(r.Config, SandboxOptions{NetworkMode: "none", NetNS: "/run/netns/x"}); err != nil ||
		len(c.Host.Mounts) > 0 || strings.Contains(c.Config.Labels[labelRecord], "ownNetNS") {
		t.Errorf("pod on the host network: %+v, %v", c, err)
	}
}

func TestEngineNetNS(t *testing.T) {
	localhost := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}

	for word, change := range map[string]func(*runtimeapi.RunPodSandboxRequest, *model.Host){
		"": func(r *runtimeapi.RunPodSandboxRequest, _ *model.Host) { r.RuntimeHandler = "runc" },
		"userns": func(_ *runtimeapi.RunPodSandboxRequest, h *model.Host) {
			h.SecurityOptions = []string{"userns"}
		},
		"rootless": func(_ *runtimeapi.RunPodSandboxRequest, h *model.Host) {
			h.SecurityOptions = []string{"rootless"}
		},
		`"kata"`: func(r *runtimeapi.RunPodSandboxRequest, _ *model.Host) { r.RuntimeHandler = "kata" },
		"seccomp": func(r *runtimeapi.RunPodSandboxRequest, _ *model.Host) {
			r.Config.Linux.SecurityContext.Seccomp = localhost
		},
		"AppArmor": func(r *runtimeapi.RunPodSandboxRequest, _ *model.Host) {
			r.Config.Linux.SecurityContext.Apparmor = localhost
		},
		"SELinux": func(r *runtimeapi.RunPodSandboxRequest, _ *model.Host) {
			r.Config.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{}
		},
	} {
		t.Run(word, func(t *testing.T) {
			r, h := netnsRequest(), model.Host{DefaultRuntime: "runc"}
			change(r, &h)
			if got := EngineNetNS(r, h); (got == "") != (word == "") || !strings.Contains(got, word) {
				t.Errorf("EngineNetNS() = %q, want %q in it", got, word)
			}
		})
	}
}

func TestNetSysctls(t *testing.T) {
	want := map[string]string{"net.core.somaxconn": "100", "net.ipv4.ip_unprivileged_port_start": "1024"}
	if diff := cmp.Diff(want, NetSysctls(netnsRequest().Config)); diff != "" {
		t.Error(diff)
	}
}

func TestHosts(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	if got := string(Hosts("web-0", ips)); !strings.HasPrefix(got, "127.0.0.1\tlocalhost\n") ||
		!strings.HasSuffix(got, "10.0.0.2\tweb-0\nfd00::2\tweb-0\n") {
		t.Error(got)
	}

	if got := string(Hosts("", ips)); strings.Contains(got, "10.0.0.2") {
		t.Error(got)
	}
}
