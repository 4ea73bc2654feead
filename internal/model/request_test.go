package model

import (
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestParseProfile(t *testing.T) {
	tests := map[string]*runtimeapi.SecurityProfile{
		"":                nil,
		"runtime/default": {},
		"docker/default":  {},
		"unconfined":      {ProfileType: runtimeapi.SecurityProfile_Unconfined},
		"localhost//a/b":  {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/a/b"},
	}

	for in, want := range tests {
		t.Run(in, func(t *testing.T) {
			got, err := ParseProfile(in)
			isUnset := got == nil && want == nil
			if err != nil || !isUnset && !proto.Equal(got, want) {
				t.Errorf("ParseProfile(%q) = %v, %v, want %v", in, got, err, want)
			}
		})
	}

	if p, err := ParseProfile("default"); p != nil || !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown profile: %v, %v", p, err)
	}
}

func TestIsNetSysctl(t *testing.T) {
	tests := map[string]bool{
		"net.core.somaxconn":     true,
		"net/core/somaxconn":     true,
		"kernel.shm_rmid_forced": false,
		"network.x":              false,
		"":                       false,
	}

	for name, want := range tests {
		t.Run(name, func(t *testing.T) {
			if got := IsNetSysctl(name); got != want {
				t.Errorf("IsNetSysctl(%q) = %v, want %v", name, got, want)
			}
		})
	}
}
