package translate

import (
	"testing"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
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
