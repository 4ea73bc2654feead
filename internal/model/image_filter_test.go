package model

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestImageFilter(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("a", 64)
	image := &Image{
		ID:          "sha256:" + "0123456789ab" + "0123456789ab0123456789ab0123456789ab0123456789abcdef",
		RepoTags:    []string{"busybox:1.36", "registry.example:5000/team/app:v2"},
		RepoDigests: []string{"busybox" + digest, "team/other" + digest},
	}

	for ref, want := range map[string]bool{
		"busybox":                         true,
		"busybox:1.36":                    true,
		"busybox:latest":                  false,
		"docker.io/library/busybox":       true,
		"docker.io/busybox:1.*":           true,
		"index.docker.io/library/busybox": true,
		"library/busybox":                 false,
		"busy*":                           true,
		"busybox:1.?6":                    true,
		"*":                               true,
		"team/*":                          true,
		"team/other":                      true,
		"*/app":                           false,
		"registry.example:5000/*/app":     true,
		"registry.example:5000/team/app":  true,
		"registry.example:5000/team/a":    false,
		"busybox" + digest:                true,
		"team/other" + digest:             true,
		"0123456789ab":                    true,
		"sha256:0123456789ab":             true,
		"0123456789a":                     false,
		"alpine":                          false,
	} {
		f, err := ParseImageFilter(ref)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
		} else if got := f.Match(image); got != want {
			t.Errorf("%s: %v, want %v", ref, got, want)
		}
	}

	if _, err := ParseImageFilter("busybox["); !errdefs.IsInvalidArgument(err) ||
		!strings.Contains(err.Error(), "filter.image.image") {
		t.Errorf("malformed pattern: %v", err)
	}
}
