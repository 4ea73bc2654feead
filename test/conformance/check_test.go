package conformance

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckPod runs the self-test like an operator, next to the daemon.
func TestCheckPod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsProgram(t)
		out := n.run(t, n.Program, "check", "--pod", "--container-runtime-endpoint=unix://"+n.Socket,
			"--docker-endpoint=unix://"+n.own(t).Socket)
		for _, want := range []string{"It works: this page comes from a pod", "check: all 12 steps passed\n"} {
			if !strings.Contains(out, want) {
				t.Errorf("output lacks %q", want)
			}
		}

		t.Log("\n" + out)
		if ids := n.docker(t, "images", "-q", "cri-dockerd.local/check"); strings.TrimSpace(ids) != "" {
			t.Errorf("the image of the self-test remains: %s", ids)
		}

		_, rest, _ := strings.Cut(out, "logs with rotation: ")
		file, kind, _ := strings.Cut(rest, ", ")
		if !strings.HasPrefix(kind, "CRI format\n") {
			t.Errorf("log format %q", kind)
		}
		if _, err := os.Stat(filepath.Dir(file)); !filepath.IsAbs(file) || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("log directory %s remains: %v", filepath.Dir(file), err)
		}
	})
}

// TestCheckPodReportsTheCause points check at a socket without a server, and at another engine than
// the daemon's. The check creates no pod then.
func TestCheckPodReportsTheCause(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsProgram(t)
		missing := filepath.Join(t.TempDir(), "missing.sock")
		for _, c := range []struct{ daemon, docker, finding string }{
			{missing, n.own(t).Socket, "daemon"},
			{n.Socket, missing, "engine"},
		} {
			t.Run(c.finding, func(t *testing.T) {
				out, err := n.own(t).Command(n.Program, "check", "--pod",
					"--container-runtime-endpoint=unix://"+c.daemon,
					"--docker-endpoint=unix://"+c.docker).CombinedOutput()
				if err == nil {
					t.Errorf("check succeeds with daemon %s and engine %s:\n%s", c.daemon, c.docker, out)
				}

				if !strings.HasPrefix(string(out), "FAIL  "+c.finding+" ") ||
					!strings.Contains(string(out), "fix: ") ||
					strings.Contains(string(out), "image loaded") {
					t.Errorf("want finding %s first, with a fix, and no pod:\n%s", c.finding, out)
				}
			})
		}
	})
}
