package answers

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRequiredExist checks that the messages and fields in required exist in the CRI.
func TestRequiredExist(t *testing.T) {
	file := (&runtimeapi.Metric{}).ProtoReflect().Descriptor().ParentFile()
	for message, fields := range required {
		m := file.Messages().ByName(message.Name())
		if m == nil || m.FullName() != message {
			t.Errorf("no message %s in the CRI", message)
			continue
		}

		for _, name := range fields {
			f := m.Fields().ByName(name)
			if f == nil || f.Kind() != protoreflect.MessageKind || f.IsList() {
				t.Errorf("no message %s in %s", name, message)
			}
		}
	}
}

func TestCheck(t *testing.T) {
	network := &runtimeapi.NetworkUsage{DefaultInterface: &runtimeapi.NetworkInterfaceUsage{Name: "eth0"}}
	stats := &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{Id: "1", Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"}},
		Linux:      &runtimeapi.LinuxPodSandboxStats{Network: network},
	}

	response := &runtimeapi.ListPodSandboxStatsResponse{Stats: []*runtimeapi.PodSandboxStats{stats}}
	if err := Check(response); err != nil {
		t.Error(err)
	}

	network.DefaultInterface = nil
	err := Check(response)
	want := "ListPodSandboxStatsResponse.stats[0].linux.network has no default_interface"
	if err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("network without an interface: got error %v, want %s", err, want)
	}

	if err := Check("text"); err == nil {
		t.Error("string: got no error")
	}
}
