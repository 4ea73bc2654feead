package engines

import "testing"

// TestCutVersion parses versions as the programs of the engines print them.
func TestCutVersion(t *testing.T) {
	for text, want := range map[string][2]int{
		"1.42":                       {1, 42},
		"26.1.5+dfsg1":               {26, 1},
		"runc version 1.1.15+ds1\nx": {1, 1},
		"containerd github.com/containerd/containerd/v2 2.4.2+unknown":        {2, 4},
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6": {1, 7},
	} {
		if major, minor, ok := cutVersion(text); !ok || major != want[0] || minor != want[1] {
			t.Errorf("%q: got %d.%d, %t, want %v", text, major, minor, ok, want)
		}
	}

	if _, _, ok := cutVersion("unknown v2"); ok {
		t.Error("a text without a version has one")
	}

	for _, c := range []struct {
		text, version string
		want          bool
	}{
		{"1.41", "1.42", false},
		{"1.45", "1.42", true},
		{"1.45", "1.5", true},
		{"2.0", "1.9", true},
		{"1.9", "2.0", false},
	} {
		if got := atLeast(t, c.text, c.version); got != c.want {
			t.Errorf("%s is at least %s: %t, want %t", c.text, c.version, got, c.want)
		}
	}
}
