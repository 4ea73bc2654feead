package translate

import (
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/image"

	"cri-dockerd/internal/model"
)

func TestReadImage(t *testing.T) {
	const id = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	i, err := ReadImage(image.Summary{
		ID:          id,
		RepoTags:    []string{"web:1", "<none>:<none>"},
		RepoDigests: []string{"<none>@<none>"},
		Size:        5,
	}, image.InspectResponse{})
	if err != nil {
		t.Fatal(err)
	}

	i.User = "1000:7"
	c := i.CRI(true)
	if len(c.RepoTags) != 1 || len(c.RepoDigests) != 0 || c.Uid.GetValue() != 1000 || c.Size != 5 || !c.Pinned {
		t.Errorf("%v", c)
	}

	for ref, want := range map[string]bool{
		"web:1":                   true,
		"docker.io/library/web:1": true,
		"web":                     false,
		"web:2":                   false,
	} {
		t.Run("name "+ref, func(t *testing.T) {
			if got := i.HasName(model.FamiliarName(ref)); got != want {
				t.Errorf("HasName(%q) = %v, want %v", ref, got, want)
			}
		})
	}

	for ref, want := range map[string]bool{
		id:                    true,
		"0123456789ab":        true,
		"sha256:0123456789ab": true,
		"0123":                false,
		"web":                 false,
	} {
		t.Run("ID "+ref, func(t *testing.T) {
			if got := i.HasID(ref); got != want {
				t.Errorf("HasID(%q) = %v, want %v", ref, got, want)
			}
		})
	}
}

// TestImageNames checks that names with a digest become digests, also if the engine lists them as
// tags.
func TestImageNames(t *testing.T) {
	one, two := "app@sha256:"+strings.Repeat("1", 64), "app@sha256:"+strings.Repeat("2", 64)
	tags, digests := imageNames([]string{"app:1", one, "<none>:<none>", two}, []string{one, "<none>@<none>"})
	if !slices.Equal(tags, []string{"app:1"}) || !slices.Equal(digests, []string{one, two}) {
		t.Errorf("tags %q, digests %q", tags, digests)
	}
}
