package model

import (
	"strings"
	"testing"
)

func TestImagePins(t *testing.T) {
	web := &Image{
		RepoTags:    []string{"web:1", "registry.example:5000/team/web:1"},
		RepoDigests: []string{"web@sha256:" + strings.Repeat("a", 64)},
		Labels:      map[string]string{"team": "platform", "io.cri-dockerd.pinned": "true"},
	}

	for _, c := range []struct {
		names, labels string // comma lists
		want          bool
	}{
		{"", "", false},
		{"web", "", true},
		{"web:1", "", true},
		{"web:2", "", false},
		{"docker.io/library/web", "", true},
		{"we", "", false},
		{"w*", "", true},
		{"registry.example:5000/*", "", true},
		{"registry.example:5000/team/web", "", true},
		{"registry.example:5000/team", "", false},
		{"other, web:*", "", true},
		{"*", "", true},
		{"web@sha256:" + strings.Repeat("a", 64), "", true},
		{"web@sha256:" + strings.Repeat("b", 64), "", false},
		{"", "team", true},
		{"", "team=platform", true},
		{"", "team==platform", true},
		{"", "team=other", false},
		{"", "team!=other", true},
		{"", "team!=platform", false},
		{"", "!team", false},
		{"", "!owner", true},
		{"", "owner,team", true},
	} {
		p, err := ParseImagePins(split(c.names), split(c.labels))
		if err != nil {
			t.Errorf("%q, %q: %v", c.names, c.labels, err)
			continue
		}

		if got := p.Match(web); got != c.want {
			t.Errorf("%q, %q: %v, want %v", c.names, c.labels, got, c.want)
		}
	}

	for _, bad := range []struct{ names, labels string }{{"UPPER", ""}, {"a b", ""}, {"", "=x"}, {"", "a b=c"},
		{"", "a b"}} {
		if _, err := ParseImagePins(split(bad.names), split(bad.labels)); err == nil {
			t.Errorf("%q, %q is accepted", bad.names, bad.labels)
		}
	}
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}
