package answers

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRequiredExist fails for a name that the CRI does not have.
func TestRequiredExist(t *testing.T) {
	file := (&runtimeapi.Metric{}).ProtoReflect().Descriptor().ParentFile()
	for message, fields := range required {
		m := file.Messages().ByName(message.Name())
		if m == nil || m.FullName() != message {
			t.Errorf("the CRI has no message %s", message)
			continue
		}

		for _, name := range fields {
			f := m.Fields().ByName(name)
			if f == nil || f.Kind() != protoreflect.MessageKind || f.IsList() {
				t.Errorf("%s has no message %s", message, name)
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

	answer := &runtimeapi.ListPodSandboxStatsResponse{Stats: []*runtimeapi.PodSandboxStats{stats}}
	if err := Check(answer); err != nil {
		t.Error(err)
	}

	network.DefaultInterface = nil
	err := Check(answer)
	if err == nil || !strings.HasPrefix(err.Error(), "ListPodSandboxStatsResponse.stats[0].linux.network has no "+
		"default_interface") {
		t.Errorf("a network without its interface: %v", err)
	}

	if err := Check("text"); err == nil {
		t.Error("a text was taken for an answer")
	}
}
