package text

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	tests := []struct {
		in    string
		limit int
		want  string
	}{
		{"plain", 10, "plain"},
		{"äöü", 6, "äöü"},
		{"äöü", 5, "ä…"},
		{"two\nlines\there", 20, "two\nlines\there"},
		{"\x1b[31mred", 20, " [31mred"},
		{"bad\xff\xfebytes", 30, "bad\uFFFD\uFFFDbytes"},
		{"a\u202Eb", 10, "a b"},
		{"0123456789", 9, "012345…"},
		{"0123456789", 2, ""},
		{"", 0, ""},
	}

	for _, c := range tests {
		t.Run(c.in, func(t *testing.T) {
			if got := Clean(c.in, c.limit); got != c.want {
				t.Errorf("Clean(%q, %d) = %q, want %q", c.in, c.limit, got, c.want)
			}
		})
	}
}

func FuzzClean(f *testing.F) {
	f.Add("x\xff\x1b\u202e", 3)
	f.Add(strings.Repeat("ä", 100), 50)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		if limit < 0 || limit > 1<<16 {
			return
		}

		got := Clean(s, limit)
		if !utf8.ValidString(got) || len(got) > limit {
			t.Errorf("%q of %d bytes from %q with limit %d", got, len(got), s, limit)
		}

		if Clean(got, limit) != got {
			t.Errorf("Clean is not stable for %q, %d", s, limit)
		}
	})
}
