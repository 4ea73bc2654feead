package translate

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"pgregory.net/rapid"

	"cri-dockerd/internal/model"
)

func TestNamesRoundTrip(t *testing.T) {
	part := rapid.StringMatching(`[a-zA-Z0-9][a-zA-Z0-9.-]{0,30}`)
	rapid.Check(t, func(t *rapid.T) {
		s := &runtimeapi.PodSandboxMetadata{
			Name:      part.Draw(t, "name"),
			Namespace: part.Draw(t, "namespace"),
			Uid:       part.Draw(t, "uid"),
			Attempt:   rapid.Uint32().Draw(t, "attempt"),
		}

		got, err := parseName("/" + SandboxName(s))
		if want := (name{model.PauseName, s.Name, s.Namespace, s.Uid, s.Attempt}); err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}

		c := &runtimeapi.ContainerMetadata{Name: part.Draw(t, "container"), Attempt: rapid.Uint32().Draw(t, "attempt")}
		got, err = parseName(ContainerName(c, s) + "_deadbeef") // the seventh part of old shims
		if want := (name{c.Name, s.Name, s.Namespace, s.Uid, c.Attempt}); err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}
	})
}

func TestParseInvalidName(t *testing.T) {
	for _, bad := range []string{
		"", "/web", "/k8s_POD_a_b_c", "/k8s_POD_a_b_c_x", "/k8s_a_b_c_d_1_e_f", "/x8s_a_b_c_d_1",
	} {
		if n, err := parseName(bad); err == nil {
			t.Errorf("parseName(%q) = %+v, want an error", bad, n)
		}
	}
}
