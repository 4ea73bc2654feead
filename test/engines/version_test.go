package engines

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

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

// TestKubernetesVersions selects the version of each module in test/kubernetes.
func TestKubernetesVersions(t *testing.T) {
	module, err := kubernetesModule()
	if err != nil {
		t.Fatal(err)
	}

	older, err := filepath.Glob(filepath.Join(module, "1.*/go.mod"))
	if err != nil || len(older) == 0 {
		t.Fatalf("modules of older versions: %q, %v", older, err)
	}

	for _, file := range append(older, filepath.Join(module, "go.mod")) {
		version, err := versionIn(file)
		if err != nil {
			t.Error(err)
			continue
		}

		cmd := exec.Command(filepath.Join(module, "../../hack/kubernetes.sh"))
		cmd.Env = append(os.Environ(), "KUBERNETES="+version)
		if out, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != version {
			t.Errorf("hack/kubernetes.sh with %s: %v, %s", version, err, out)
		}
	}
}
