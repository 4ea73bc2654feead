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

// buildOnce builds the program like the pages.
var buildOnce = sync.OnceValues(func() ([]byte, error) {
	cmd := exec.Command("make", "build")
	cmd.Dir = root
	return cmd.CombinedOutput()
})

// binary returns the path of the built program.
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

// TestCommands runs the commands of all pages: in the repository, and on a node after an
// installation from source. It runs each page from start to end. docs/migrate.md changes settings
// and docs/upgrade.md uninstalls the program, so they come last.
func TestCommands(t *testing.T) {
	// translations have the same commands
	all := slices.DeleteFunc(pages(t), func(p *page) bool { return filepath.Dir(p.path) == "docs/zh" })
	order := func(p *page) int {
		return map[string]int{"docs/install.md": -1, "docs/migrate.md": 1, "docs/upgrade.md": 2}[p.path]
	}
	slices.SortStableFunc(all, func(a, b *page) int { return order(a) - order(b) })

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
			return // later pages depend on earlier ones
		}
	}
}

// prepareNode starts a node with the files of a checkout after make build.
func prepareNode(t *testing.T) *nodes.Node {
	t.Helper()
	n := nodes.Start(t, nodes.Config{})
	n.Copy(t, binary(t), "/root/cri-dockerd/bin/cri-dockerd")
	units, err := filepath.Glob(filepath.Join(root, "deploy/systemd/*"))
	if err != nil {
		t.Fatal(err)
	}

	for _, name := range []string{"Makefile", "install.sh", "deploy/package/default"} {
		n.Copy(t, filepath.Join(root, name), "/root/cri-dockerd/"+name)
	}
	for _, u := range units {
		n.Copy(t, u, "/root/cri-dockerd/deploy/systemd/"+filepath.Base(u))
	}

	return n
}

// run runs the blocks of a page for these groups. Each block has its own shell, and stops at the
// first error. run compares the output with the output block after it.
func (p *page) run(t *testing.T, groups []string, shell func(script string) *exec.Cmd) {
	t.Helper()
	for i, b := range p.blocks {
		group := b.marks["run"]
		if !slices.Contains(groups, group) {
			continue
		}

		at := fmt.Sprintf("%s:%d", p.path, b.line)
		out, err := shell(b.text).CombinedOutput()
		var exit *exec.ExitError
		if group == "node-status" && errors.As(err, &exit) && exit.ExitCode() == 1 {
			err = nil // the command reports failures of the node
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

// compare checks that the actual output contains the expected lines in order. It may contain other
// lines in between.
func compare(t *testing.T, at, expected, actual string) {
	t.Helper()
	remaining := strings.Split(actual, "\n")
	for l := range strings.SplitSeq(strings.TrimSpace(expected), "\n") {
		pattern := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(l)), "…", ".*") + "$")
		i := slices.IndexFunc(remaining, func(s string) bool { return pattern.MatchString(strings.TrimSpace(s)) })
		if i < 0 {
			t.Errorf("%s: no line %q in output:\n%s", at, l, actual)
			return
		}
		remaining = remaining[i+1:]
	}
}

// TestOutputs checks that each output block follows a block with run=.
func TestOutputs(t *testing.T) {
	for _, p := range pages(t) {
		for i, b := range p.blocks {
			if b.language == "output" && (i == 0 || p.blocks[i-1].marks["run"] == "") {
				t.Errorf("%s:%d: output without run= on the block before it; use text", p.path, b.line)
			}
		}
	}

	if os.Getuid() != 0 {
		t.Fatal("tests of commands require root")
	}
}
