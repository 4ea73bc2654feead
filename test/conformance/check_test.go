package conformance

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckPod runs the self-test as an operator does, beside the daemon.
func TestCheckPod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		out := n.run(t, n.Program, "check", "--pod", "--container-runtime-endpoint=unix://"+n.Socket,
			"--docker-endpoint=unix://"+n.own(t).Socket)
		for _, want := range []string{"It works: this page comes from a pod", "check: all 12 steps passed\n"} {
			if !strings.Contains(out, want) {
				t.Errorf("the output lacks %q", want)
			}
		}

		t.Log("\n" + out)
		if left := n.docker(t, "images", "-q", "cri-dockerd.local/check"); strings.TrimSpace(left) != "" {
			t.Errorf("its image is left: %s", left)
		}

		_, rest, _ := strings.Cut(out, "logs, rotated once: ")
		file, kind, _ := strings.Cut(rest, ", ")
		if !strings.HasPrefix(kind, "in the CRI's format\n") {
			t.Errorf("the log is %q", kind)
		}
		if _, err := os.Stat(filepath.Dir(file)); !filepath.IsAbs(file) || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its log folder %s is left: %v", filepath.Dir(file), err)
		}
	})
}

// TestCheckPodSaysWhatIsWrong points check at a socket that nobody serves, and at another engine
// than the daemon's: no pod is tried then.
func TestCheckPodSaysWhatIsWrong(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		nowhere := filepath.Join(t.TempDir(), "nobody.sock")
		for _, c := range []struct{ daemon, docker, finding string }{
			{nowhere, n.own(t).Socket, "daemon"},
			{n.Socket, nowhere, "engine"},
		} {
			out, err := n.own(t).Command(n.Program, "check", "--pod", "--container-runtime-endpoint=unix://"+c.daemon,
				"--docker-endpoint=unix://"+c.docker).CombinedOutput()
			if err == nil {
				t.Errorf("with daemon %s and docker %s it does not fail:\n%s", c.daemon, c.docker, out)
			}

			if !strings.HasPrefix(string(out), "FAIL  "+c.finding+" ") || !strings.Contains(string(out), "fix: ") ||
				strings.Contains(string(out), "image made") {
				t.Errorf("%s does not come first, or a pod is tried:\n%s", c.finding, out)
			}
		}
	})
}
