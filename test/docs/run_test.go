package docs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"cri-dockerd/test/nodes"
)

// buildOnce makes the program as the pages say.
var buildOnce = sync.OnceValues(func() ([]byte, error) {
	cmd := exec.Command("make", "build")
	cmd.Dir = root
	return cmd.CombinedOutput()
})

// binary is the program as it is shipped.
func binary(t *testing.T) string {
	t.Helper()
	if out, err := buildOnce(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}

	path, err := filepath.Abs(filepath.Join(root, "bin/cri-dockerd"))
	if err != nil {
		t.Fatal(err)
	}

	return path
}

// TestCommands runs what the pages say is run: in the repository, and on a node on which the
// program is first installed from source. Each page is run from its beginning to its end;
// docs/migrate.md, which leaves other settings, and docs/upgrade.md, with what is done at last,
// come last.
func TestCommands(t *testing.T) {
	// the same commands again
	all := slices.DeleteFunc(pages(t), func(p *page) bool { return filepath.Dir(p.path) == "docs/zh" })
	last := func(p *page) int {
		return map[string]int{"docs/install.md": -1, "docs/migrate.md": 1, "docs/upgrade.md": 2}[p.path]
	}
	slices.SortStableFunc(all, func(a, b *page) int { return last(a) - last(b) })

	for _, p := range all {
		p.run(t, []string{"repo"}, func(script string) *exec.Cmd {
			cmd := exec.Command("bash", "-ec", script)
			cmd.Dir = root
			return cmd
		})
	}

	n := prepareNode(t)
	for _, p := range all {
		p.run(t, []string{"source", "node", "node-status"}, func(script string) *exec.Cmd {
			return n.Command("bash", "-ec", "cd /root/cri-dockerd; exec 2>&1; "+script)
		})
		if t.Failed() {
			return // what comes later may need what failed
		}
	}
}

// prepareNode is a node with what a checkout of the repository has after make build.
func prepareNode(t *testing.T) *nodes.Node {
	t.Helper()
	n := nodes.Start(t, nodes.Config{})
	n.Copy(t, binary(t), "/root/cri-dockerd/bin/cri-dockerd")
	units, err := filepath.Glob(filepath.Join(root, "deploy/systemd/*"))
	if err != nil {
		t.Fatal(err)
	}

	n.Copy(t, filepath.Join(root, "deploy/package/default"), "/root/cri-dockerd/deploy/package/default")
	for _, u := range units {
		n.Copy(t, u, "/root/cri-dockerd/deploy/systemd/"+filepath.Base(u))
	}

	return n
}

// run runs the blocks of a page that are for these places, each in a shell of its own that ends
// with the first error, and compares what they print with the block that follows.
func (p *page) run(t *testing.T, places []string, shell func(script string) *exec.Cmd) {
	t.Helper()
	for i, b := range p.blocks {
		where := b.marks["run"]
		if !slices.Contains(places, where) {
			continue
		}

		at := fmt.Sprintf("%s:%d", p.path, b.line)
		out, err := shell(b.text).CombinedOutput()
		var exit *exec.ExitError
		if where == "node-status" && errors.As(err, &exit) && exit.ExitCode() == 1 {
			err = nil // it found something, which is what it is for
		}

		if err != nil {
			t.Errorf("%s: %v\n%s%s", at, err, b.text, out)
			return
		}

		if i+1 < len(p.blocks) && p.blocks[i+1].language == "output" {
			compare(t, at, p.blocks[i+1].text, string(out))
		}
	}
}

// compare looks for the lines of an expected output in the actual one, in this order; others may
// stand between them.
func compare(t *testing.T, at, expected, actual string) {
	t.Helper()
	rest := strings.Split(actual, "\n")
	for l := range strings.SplitSeq(strings.TrimSpace(expected), "\n") {
		pattern := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(l)), "…", ".*") + "$")
		i := slices.IndexFunc(rest, func(s string) bool { return pattern.MatchString(strings.TrimSpace(s)) })
		if i < 0 {
			t.Errorf("%s: no line %q in its output:\n%s", at, l, actual)
			return
		}
		rest = rest[i+1:]
	}
}

// TestOutputs: an output stands after the commands that print it, and something compares it.
func TestOutputs(t *testing.T) {
	for _, p := range pages(t) {
		for i, b := range p.blocks {
			if b.language == "output" && (i == 0 || p.blocks[i-1].marks["run"] == "") {
				t.Errorf("%s:%d: nobody compares this output, since the block before it is not run; use text", p.path,
					b.line)
			}
		}
	}

	if os.Getuid() != 0 {
		t.Fatal("tests of commands need root")
	}
}
