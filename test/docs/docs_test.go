package docs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// groups are the values of run=, see run_test.go.
var groups = []string{"repo", "source", "node", "node-status"}

// TestCommandMarks checks the marks of command blocks. Each block needs one of run=, tested= and
// not-run=.
func TestCommandMarks(t *testing.T) {
	for _, p := range pages(t) {
		for _, problem := range p.problems {
			t.Error(problem)
		}

		for _, b := range p.blocks {
			at := fmt.Sprintf("%s:%d", p.path, b.line)
			if !b.isCommands() {
				for _, m := range []string{"run", "tested", "not-run"} {
					if b.marks[m] != "" {
						t.Errorf("%s: %s= on a block of %s, not of commands", at, m, b.language)
					}
				}
				continue
			}

			run, tested, reason := b.marks["run"], b.marks["tested"], b.marks["not-run"]
			switch {
			case run != "" && tested == "" && reason == "":
				if !slices.Contains(groups, run) {
					t.Errorf("%s: run=%s: use one of %q", at, run, groups)
				}

			case tested != "" && run == "" && reason == "":
				checkTested(t, at, b, tested)
			case reason != "" && run == "" && tested == "":
				if len(strings.Fields(reason)) < 3 {
					t.Errorf("%s: not-run=%q: give a reason", at, reason)
				}

			default:
				t.Errorf("%s: got marks %q, want one of run=, tested= and not-run= (docs/README.md)", at, b.marks)
			}
		}
	}
}

// normalize removes quotes, commas and other separators from a line, to compare a typed command
// with one in Go or in a shell script.
func normalize(s string) string {
	s = strings.NewReplacer(`\n`, " ", `\`, " ").Replace(s)
	return " " + strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return strings.ContainsRune(" \t\n\"'`,;()[]{}+", r)
	}), " ") + " "
}

var sources = map[string]string{}

// checkTested checks that the tests in dir contain each command of a block.
func checkTested(t *testing.T, at string, b block, dir string) {
	t.Helper()
	if sources[dir] == "" {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			sources[dir] += normalize(string(text))
			return err
		})
		if err != nil || !strings.HasPrefix(dir, "test/") {
			t.Errorf("%s: tested=%s: %v", at, dir, err)
			return
		}
	}

	for _, l := range b.lines() {
		if !strings.Contains(sources[dir], normalize(l)) {
			t.Errorf("%s: no test in %s has the command %q", at, dir, l)
		}
	}
}

// TestQuotedFiles: a block with file= has the content of the file, which tests use.
func TestQuotedFiles(t *testing.T) {
	found := 0
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if b.marks["file"] == "" {
				continue
			}

			found++
			if want := readText(t, filepath.Join(root, b.marks["file"])); b.text != want {
				t.Errorf("%s:%d: got\n%s\nwant the content of %s:\n%s", p.path, b.line, b.text, b.marks["file"], want)
			}
		}
	}

	if found == 0 {
		t.Error("no page quotes a file")
	}
}

// TestPages checks the top-level heading and the links of each page.
func TestPages(t *testing.T) {
	all := map[string]*page{}
	for _, p := range pages(t) {
		all[p.path] = p
	}

	for _, p := range all {
		first := 0
		for _, title := range p.titles {
			if strings.HasPrefix(title, "# ") {
				first++
			}
		}

		if first != 1 {
			t.Errorf("%s: got %d top-level headings, want 1", p.path, first)
		}

		for _, l := range p.links {
			if strings.Contains(l.target, "://") {
				continue
			}

			file, anchor, _ := strings.Cut(l.target, "#")
			target := p.path
			if file != "" {
				target = filepath.Join(filepath.Dir(p.path), file)
			}

			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s:%d: broken link: %v", p.path, l.line, err)
			} else if anchor != "" && (all[target] == nil || !slices.Contains(all[target].anchors(), anchor)) {
				t.Errorf("%s:%d: %s has no heading #%s", p.path, l.line, target, anchor)
			}
		}
	}
}

// TestIndex checks the links from docs/README.md to all other pages.
func TestIndex(t *testing.T) {
	linked := map[string]bool{}
	for _, l := range read(t, "docs/README.md").links {
		linked[filepath.Join("docs", l.target)] = true
	}

	for _, p := range pages(t) {
		if dir := filepath.Dir(p.path); (dir == "docs" || dir == "docs/zh") && p.path != "docs/README.md" &&
			!linked[p.path] {
			t.Errorf("docs/README.md has no link to %s", p.path)
		}
	}
}

// TestTranslations compares the blocks of translated pages with the originals: commands, outputs
// and errors.
func TestTranslations(t *testing.T) {
	found := 0
	for _, p := range pages(t) {
		if filepath.Dir(p.path) != "docs/zh" {
			continue
		}

		found++
		original := read(t, filepath.Join("docs", filepath.Base(p.path)))
		for i := range max(len(p.blocks), len(original.blocks)) {
			switch {
			case i >= len(p.blocks):
				t.Fatalf("%s: no block like %s:%d", p.path, original.path, original.blocks[i].line)
			case i >= len(original.blocks):
				t.Fatalf("%s:%d: no such block in the original", p.path, p.blocks[i].line)
			}

			a, b := p.blocks[i], original.blocks[i]
			if a.language != b.language || a.text != b.text || fmt.Sprint(a.marks) != fmt.Sprint(b.marks) {
				t.Fatalf("%s:%d differs from %s:%d:\n%s\n%s", p.path, a.line, original.path, b.line, a.text, b.text)
			}
		}

		if len(p.titles) != len(original.titles) {
			t.Errorf("%s: got %d headings, want %d like the original", p.path, len(p.titles), len(original.titles))
		}
	}

	if found < 3 {
		t.Errorf("got %d translated pages, want at least install, kubeadm and troubleshooting", found)
	}
}

// help returns the local flags of a command with their defaults, from `cri-dockerd <command>
// --help`.
func help(t *testing.T, command string) map[string]string {
	t.Helper()
	args := []string{"--help"}
	if command != "" {
		args = []string{command, "--help"}
	}

	out, err := exec.Command(binary(t), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}

	own, _, _ := strings.Cut(string(out), "\nGlobal Flags:")
	flags := map[string]string{}
	line := regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z0-9-]+)(\[=true)?.*?(?:\(default (.*)\))?$`)
	for _, m := range line.FindAllStringSubmatch(own, -1) {
		flags[m[1]] = plain(m[3])
		if m[2] != "" && m[3] == "" {
			flags[m[1]] = "false"
		}
	}

	if len(flags) == 0 {
		t.Fatalf("%q: no flags in:\n%s", args, out)
	}

	return flags
}

// plain removes quotes and brackets from a default.
func plain(s string) string { return strings.Trim(s, "\"[]`") }

var flagRow = regexp.MustCompile("(?m)^\\| `(?:([a-z-]+) )?--([a-z0-9-]+)`[^|]*\\| ([^|]*) \\|")

// subcommands returns the subcommands with local flags.
func subcommands(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command(binary(t), "--help").Output()
	_, list, _ := strings.Cut(string(out), "Available Commands:\n")
	list, _, found := strings.Cut(list, "\n\n")
	if err != nil || !found {
		t.Fatalf("--help: %v\n%s", err, out)
	}

	var all []string
	for l := range strings.Lines(list) {
		if name := strings.Fields(l)[0]; !slices.Contains([]string{"completion", "help", "version"}, name) {
			all = append(all, name)
		}
	}

	return all
}

// TestFlags compares docs/flags.md with the flags of the program and their defaults.
func TestFlags(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "docs/flags.md"))
	if err != nil {
		t.Fatal(err)
	}

	documented := map[string]map[string]string{"": {}}
	for _, c := range subcommands(t) {
		documented[c] = map[string]string{}
	}

	for _, m := range flagRow.FindAllStringSubmatch(string(b), -1) {
		if documented[m[1]] == nil {
			t.Errorf("docs/flags.md: unknown command %s", m[1])
			continue
		}

		if _, twice := documented[m[1]][m[2]]; twice {
			t.Errorf("docs/flags.md: duplicate --%s", m[2])
		}

		documented[m[1]][m[2]] = plain(strings.Trim(m[3], "`"))
	}

	for command, flags := range documented {
		actual := help(t, command)
		if command != "" {
			delete(actual, "help")
		}

		for name, value := range actual {
			if v, ok := flags[name]; !ok {
				t.Errorf("docs/flags.md: %s --%s is missing", command, name)
			} else if v != value && name != "help" {
				t.Errorf("docs/flags.md: %s --%s has the default %q, want %q", command, name, v, value)
			}
		}

		for name := range flags {
			if _, ok := actual[name]; !ok {
				t.Errorf("docs/flags.md: unknown flag %s --%s", command, name)
			}
		}
	}
}

// TestSettings compares the flags in configuration examples with the flags of the daemon.
func TestSettings(t *testing.T) {
	known := help(t, "")
	flag := regexp.MustCompile(`--([a-z0-9-]+)`)
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if b.language != "ini" {
				continue
			}

			for _, m := range flag.FindAllStringSubmatch(b.text, -1) {
				if _, ok := known[m[1]]; !ok {
					t.Errorf("%s:%d: unknown flag --%s", p.path, b.line, m[1])
				}
			}
		}
	}
}
