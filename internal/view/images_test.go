package view

import (
	"fmt"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// describe returns the content of a store for comparisons.
func (s *imageStore) describe() string {
	var out []string
	for _, i := range s.all {
		out = append(out, fmt.Sprint(strings.TrimPrefix(string(i.ID), "sha256:"), i.RepoTags))
	}
	return strings.Join(out, " ")
}

// TestImageChanges: the result for one image survives lists started before it, and only those.
func TestImageChanges(t *testing.T) {
	image := func(id string, tags ...string) *model.Image {
		return &model.Image{ID: model.ImageID("sha256:" + id), RepoTags: tags}
	}
	list := func(images ...*model.Image) []*model.Image { return images }
	a, b := image("a", "app:1"), image("b", "app:2")
	tests := map[string]struct {
		do   func(*imageStore)
		want string
	}{
		"pulled during a list": {func(s *imageStore) {
			s.put(b.ID, b, 3)
			s.replace(list(a), 2)
		}, "a[app:1] b[app:2]"},
		"removed by others after it was pulled": {func(s *imageStore) {
			s.put(b.ID, b, 3)
			s.replace(list(a), 4)
		}, "a[app:1]"},
		"removed during a list": {func(s *imageStore) {
			s.replace(list(a, b), 1)
			s.put(b.ID, nil, 3)
			s.replace(list(a, b), 2)
		}, "a[app:1]"},
		"found by a request that began before the removal": {func(s *imageStore) {
			s.replace(list(a), 1)
			s.put(b.ID, nil, 3)
			s.put(b.ID, b, 2)
		}, "a[app:1]"},
		"pulled again after the removal": {func(s *imageStore) {
			s.replace(list(a), 1)
			s.put(b.ID, nil, 2)
			s.put(b.ID, b, 3)
		}, "a[app:1] b[app:2]"},
		"found by a request older than the list": {func(s *imageStore) {
			s.replace(list(a), 3)
			s.put(b.ID, b, 2)
		}, "a[app:1]"},
		"a pull takes a name": {func(s *imageStore) {
			s.replace(list(a, b), 1)
			c := image("c", "app:1")
			s.put(c.ID, c, 2)
		}, "a[] b[app:2] c[app:1]"},
		"an older list": {func(s *imageStore) {
			s.replace(list(a), 2)
			s.replace(list(a, b), 1)
		}, "a[app:1]"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newImageStore()
			if test.do(&s); s.describe() != test.want {
				t.Errorf("%s: %s, want %s", name, s.describe(), test.want)
			}
		})
	}

	if len(a.RepoTags) != 1 {
		t.Error("a shared record was modified")
	}
}
