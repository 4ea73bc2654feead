package translate

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

func id64(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

// imageUserCases are containers of an image with the user app in the group extra.
var imageUserCases = map[string]struct {
	sc       *runtimeapi.LinuxContainerSecurityContext
	image    string // its USER
	unknown  bool   // the users of the image
	groupAdd []string
	recorded string
}{
	"root":              {sc: &runtimeapi.LinuxContainerSecurityContext{}, recorded: `{"uid":0,"gid":0,"groups":[0]}`},
	"user of the image": {image: "app", recorded: `{"uid":1000,"gid":1001,"groups":[1001,7777]}`},
	"user and group of the image": {
		image:    "app:5",
		groupAdd: []string{"7777"},
		recorded: `{"uid":1000,"gid":5,"groups":[5,7777]}`,
	},
	"user": {
		sc:       &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id64(1000), SupplementalGroups: []int64{9}},
		groupAdd: []string{"9"},
		recorded: `{"uid":1000,"gid":1001,"groups":[1001,7777,9]}`,
	},
	"user and group": {
		sc: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser:          id64(1000),
			RunAsGroup:         id64(5),
			SupplementalGroups: []int64{9},
		},
		groupAdd: []string{"9", "7777"},
		recorded: `{"uid":1000,"gid":5,"groups":[5,7777,9]}`,
	},
	"requested twice": {
		sc: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser:          id64(1000),
			RunAsGroup:         id64(7777),
			SupplementalGroups: []int64{7777},
		},
		groupAdd: []string{"7777"},
		recorded: `{"uid":1000,"gid":7777,"groups":[7777]}`,
	},
	"strict": {
		sc: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser:                id64(1000),
			RunAsGroup:               id64(5),
			SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict,
		},
		recorded: `{"uid":1000,"gid":5,"groups":[5]}`,
	},
	"unknown name":  {image: "nobody", recorded: "null"},
	"unknown users": {unknown: true, image: "app", recorded: "null"},
}

// TestImageUsers checks Docker's groups and the recorded user of containers whose image has users.
func TestImageUsers(t *testing.T) {
	accounts := &model.Accounts{}
	if err := errors.Join(accounts.AddUsers(strings.NewReader("app:x:1000:1001::/:\n")),
		accounts.AddGroups(strings.NewReader("extra:x:7777:app\n"))); err != nil {
		t.Fatal(err)
	}

	for name, c := range imageUserCases {
		t.Run(name, func(t *testing.T) {
			meta := &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}
			pod := &runtimeapi.PodSandboxConfig{Metadata: meta}
			cfg := &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
				Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: c.sc},
			}
			o := ContainerOptions{
				Host:     hosts["20.10"],
				Sandbox:  &model.Sandbox{ID: "0123", Name: SandboxName(pod.Metadata), Metadata: pod.Metadata},
				Image:    &model.Image{User: c.image},
				Accounts: accounts,
			}
			if c.unknown {
				o.Accounts = nil
			}

			create, err := NewContainer(cfg, pod, o)
			if err != nil {
				t.Fatal(err)
			}

			var r record
			if err := json.Unmarshal([]byte(create.Config.Labels[labelRecord]), &r); err != nil {
				t.Fatal(err)
			}
			recorded, err := json.Marshal(r.Container.User)
			if err != nil {
				t.Fatal(err)
			}

			if !slices.Equal(create.Host.GroupAdd, c.groupAdd) || string(recorded) != c.recorded {
				t.Errorf("groups %q, recorded %s; want %q, %s", create.Host.GroupAdd, recorded, c.groupAdd, c.recorded)
			}
		})
	}
}
