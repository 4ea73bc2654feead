package translate

import (
	"maps"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestReadForeignSandbox reads a sandbox of an older shim, without a record.
func TestReadForeignSandbox(t *testing.T) {
	in := inspect(typeSandbox, container.State{Status: "running", Running: true, Pid: 9})
	in.Name = "/k8s_POD_web_default_u_0"
	in.Config.Labels = map[string]string{
		labelType:               typeSandbox,
		labelName:               model.PauseName,
		"app":                   "web",
		"annotation.a":          "b",
		"io.kubernetes.pod.uid": "u",
	}

	in.HostConfig.NetworkMode = "none"
	s := read(t, in).Sandbox
	if s == nil || s.Metadata.Name != "web" || s.Metadata.Uid != "u" || !s.Running || s.HostNetwork() ||
		s.Namespaces.Pid != runtimeapi.NamespaceMode_CONTAINER {
		t.Fatalf("%+v", s)
	}

	if diff := cmp.Diff(map[string]string{"app": "web", "io.kubernetes.pod.uid": "u"}, s.Labels); diff != "" {
		t.Error(diff)
	}

	st := s.Status([]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")})
	if st.Network.Ip != "10.0.0.1" || len(st.Network.AdditionalIps) != 1 ||
		st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("status: %v", st)
	}
}

// TestReadForeignSandboxName reads a sandbox of an older shim with metadata only in its name. The
// name has the seventh part for a name conflict.
func TestReadForeignSandboxName(t *testing.T) {
	in := inspect(typeSandbox, container.State{Status: "running", Running: true, Pid: 7})
	in.Name = "/k8s_POD_web_default_u_3_deadbeef"
	in.Config.Labels = map[string]string{
		labelType:                typeSandbox,
		labelName:                model.PauseName,
		"io.kubernetes.pod.name": "web",
		"annotation.a":           "b",
	}

	in.HostConfig.NetworkMode = "bridge"
	in.HostConfig.PortBindings = network.PortMap{
		network.MustParsePort("80/tcp"): {{HostPort: "8080"}},
		network.MustParsePort("53/udp"): {{HostPort: "53", HostIP: netip.MustParseAddr("192.0.2.1")}},
	}

	s := read(t, in).Sandbox
	if s == nil || !s.Foreign || !s.EngineNetwork() || s.HostNetwork() {
		t.Fatalf("%+v", s)
	}

	want := &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u", Attempt: 3}
	if !proto.Equal(s.Metadata, want) || !maps.Equal(s.Labels, map[string]string{"io.kubernetes.pod.name": "web"}) ||
		!maps.Equal(s.Annotations, map[string]string{"a": "b"}) {
		t.Errorf("%v, %v, %v", s.Metadata, s.Labels, s.Annotations)
	}

	wantPorts := []*runtimeapi.PortMapping{{
		Protocol:      runtimeapi.Protocol_UDP,
		ContainerPort: 53,
		HostPort:      53,
		HostIp:        "192.0.2.1",
	}, {ContainerPort: 80, HostPort: 8080}}
	if diff := cmp.Diff(wantPorts, s.EnginePorts, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	for mode, want := range map[container.NetworkMode]bool{
		"none":    false,
		"host":    false,
		"default": true,
		"bridge":  true,
		"mine":    true,
		"":        false,
	} {
		t.Run("network mode "+string(mode), func(t *testing.T) {
			in.HostConfig.NetworkMode = mode
			if got := read(t, in).Sandbox.EngineNetwork(); got != want {
				t.Errorf("EngineNetwork() = %v, want %v", got, want)
			}
		})
	}

	own := &record{Name: "k8s_POD_web_default_u_3_deadbeef", Sandbox: &sandboxRecord{Pid: "POD", OwnNetNS: true}}
	labels, err := own.write(map[string]string{labelType: typeSandbox})
	if err != nil {
		t.Fatal(err)
	}

	in.Config.Labels, in.HostConfig.NetworkMode = labels, "host"
	if s := read(t, in).Sandbox; s.Foreign || s.EngineNetwork() || s.HostNetwork() {
		t.Errorf("sandbox with a record: %+v", s)
	}
}
