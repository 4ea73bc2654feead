package model

import (
	"strings"
	"testing"
)

func TestDigestedName(t *testing.T) {
	built := &Image{ID: "sha256:beef"}
	pulled := &Image{ID: "sha256:cafe", RepoDigests: []string{"busybox@sha256:1", "localhost:5000/team/app@sha256:2"}}

	for _, test := range []struct {
		image     *Image
		ref, want string
	}{
		{pulled, "localhost:5000/team/app:7", "localhost:5000/team/app@sha256:2"},
		{pulled, "docker.io/library/busybox", "busybox@sha256:1"},
		{pulled, "other:1", "busybox@sha256:1"},
		{pulled, "sha256:cafe", "busybox@sha256:1"},
		{built, "built:1", ""},
	} {
		if got := test.image.DigestedName(test.ref); got != test.want {
			t.Errorf("%s: %q, want %q", test.ref, got, test.want)
		}
	}
}

func TestFamiliarName(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"busybox": "busybox:latest", "docker.io/library/busybox:1": "busybox:1",
		"registry.example:5000/a/b": "registry.example:5000/a/b:latest",
		"web:1@" + d:                "web@" + d, "UPPER": "", "": "",
	} {
		if got := FamiliarName(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}
