package translate

import (
	"testing"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func TestReadSeccomp(t *testing.T) {
	for name, test := range map[string]struct {
		host container.HostConfig
		want runtimeapi.SecurityProfile_ProfileType
	}{
		"default": {
			container.HostConfig{SecurityOpt: []string{"no-new-privileges", "apparmor=unconfined"}},
			runtimeapi.SecurityProfile_RuntimeDefault,
		},
		"unconfined": {
			container.HostConfig{SecurityOpt: []string{"seccomp=unconfined"}},
			runtimeapi.SecurityProfile_Unconfined,
		},
		"a profile": {
			container.HostConfig{SecurityOpt: []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW"}`}},
			runtimeapi.SecurityProfile_Localhost,
		},
		"privileged": {container.HostConfig{Privileged: true}, runtimeapi.SecurityProfile_Unconfined},
	} {
		t.Run(name, func(t *testing.T) {
			if got := readSeccomp(&test.host); got != test.want {
				t.Errorf("the profile is %s, want %s", got, test.want)
			}
		})
	}
}

// TestReadLimits reads limits that the CRI does not have. Docker's -1 is no limit.
func TestReadLimits(t *testing.T) {
	limit, none := int64(7), int64(-1)
	for name, test := range map[string]struct {
		host container.Resources
		want model.PluginResources
	}{
		"limits": {
			container.Resources{PidsLimit: &limit, MemoryReservation: 8},
			model.PluginResources{PidsLimit: 7, MemoryReservation: 8},
		},
		"no limit": {container.Resources{PidsLimit: &none}, model.PluginResources{}},
		"unset":    {},
	} {
		t.Run(name, func(t *testing.T) {
			in := container.InspectResponse{
				HostConfig: &container.HostConfig{Resources: test.host},
				Config:     &container.Config{},
			}
			if got := ReadProcess(in).Limits; got != test.want {
				t.Errorf("limits %+v, want %+v", got, test.want)
			}
		})
	}
}
