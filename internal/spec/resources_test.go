package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestKernelLimitsAreChecked: what would name another file than that of a limit is refused with the
// field's name, where a request is validated and again where it is translated.
func TestKernelLimitsAreChecked(t *testing.T) {
	for _, c := range []struct {
		field     string
		resources *runtimeapi.LinuxContainerResources
	}{
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"cgroup.procs": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high/../../x": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory..high": "1"}}},
		{"linux.unified", &runtimeapi.LinuxContainerResources{
			Unified: map[string]string{strings.Repeat("a", 1<<20): "1"},
		}},
		{"linux.hugepage_limits[0].page_size",
			&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "../2MB"}}}},
		{"linux.hugepage_limits[0].page_size",
			&runtimeapi.LinuxContainerResources{
				HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "99999999999MB"}},
			}},
	} {
		_, translated := NewUpdate(c.resources, Host{CgroupVersion: "2"})
		validated := Validate(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c", Linux: c.resources})
		for what, err := range map[string]error{"translated": translated, "validated": validated} {
			if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), c.field) || len(err.Error()) > 1000 {
				t.Errorf("%s: %.300v, want %s", what, err, c.field)
			}
		}
	}
}
