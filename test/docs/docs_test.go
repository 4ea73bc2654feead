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

// groups are the places where commands are run, see run_test.go.
var groups = []string{"repo", "source", "node", "node-status"}

// TestEveryCommandIsMarked: a block of commands says where it is run, which tests run it, or why
// nobody does.
func TestEveryCommandIsMarked(t *testing.T) {
	for _, p := range pages(t) {
		for _, problem := range p.problems {
			t.Error(problem)
		}

		for _, b := range p.blocks {
			at := fmt.Sprintf("%s:%d", p.path, b.line)
			if !b.commands() {
				for _, m := range []string{"run", "tested", "not-run"} {
					if b.marks[m] != "" {
						t.Errorf("%s: %s= on %q, which is no block of commands", at, m, b.language)
					}
				}
				continue
			}

			run, tested, reason := b.marks["run"], b.marks["tested"], b.marks["not-run"]
			switch {
			case run != "" && tested == "" && reason == "":
				if !slices.Contains(groups, run) {
					t.Errorf("%s: run=%s, which is none of %q", at, run, groups)
				}

			case tested != "" && run == "" && reason == "":
				quoted(t, at, b, tested)
			case reason != "" && run == "" && tested == "":
				if len(strings.Fields(reason)) < 3 {
					t.Errorf("%s: not-run=%q is no reason", at, reason)
				}

			default:
				t.Errorf("%s: give one of run=, tested= and not-run= (docs/README.md); it has %q", at, b.marks)
			}
		}
	}
}

// words are what is left of a line when quotes, commas and the like are gone, by which a command in
// Go or a shell script can be compared with one that is typed.
func words(s string) string {
	s = strings.NewReplacer(`\n`, " ", `\`, " ").Replace(s)
	return " " + strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return strings.ContainsRune(" \t\n\"'`,;()[]{}+", r)
	}), " ") + " "
}

var sources = map[string]string{}

// quoted: each command of the block stands in the files of the tests in dir.
func quoted(t *testing.T, at string, b block, dir string) {
	t.Helper()
	if sources[dir] == "" {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			sources[dir] += words(string(text))
			return err
		})
		if err != nil || !strings.HasPrefix(dir, "test/") {
			t.Errorf("%s: tested=%s: %v", at, dir, err)
			return
		}
	}

	for _, l := range b.lines() {
		if !strings.Contains(sources[dir], words(l)) {
			t.Errorf("%s: no test in %s has the command %q", at, dir, l)
		}
	}
}

// TestPages: one heading of the first order each, and links that lead somewhere.
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
			t.Errorf("%s has %d headings of the first order", p.path, first)
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
				t.Errorf("%s:%d: a link to nowhere: %v", p.path, l.line, err)
			} else if anchor != "" && (all[target] == nil || !slices.Contains(all[target].anchors(), anchor)) {
				t.Errorf("%s:%d: %s has no heading #%s", p.path, l.line, target, anchor)
			}
		}
	}
}

// TestIndex: every page can be reached from docs/README.md.
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

// TestTranslations: a translated page has the blocks of its original, commands, outputs and errors,
// word for word.
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
				t.Fatalf("%s lacks the block of %s:%d", p.path, original.path, original.blocks[i].line)
			case i >= len(original.blocks):
				t.Fatalf("%s:%d: the original has no such block", p.path, p.blocks[i].line)
			}

			a, b := p.blocks[i], original.blocks[i]
			if a.language != b.language || a.text != b.text || fmt.Sprint(a.marks) != fmt.Sprint(b.marks) {
				t.Fatalf("%s:%d differs from %s:%d:\n%s\n%s", p.path, a.line, original.path, b.line, a.text, b.text)
			}
		}

		if len(p.titles) != len(original.titles) {
			t.Errorf("%s has %d headings, its original %d", p.path, len(p.titles), len(original.titles))
		}
	}

	if found < 3 {
		t.Errorf("%d translated pages, install, kubeadm and troubleshooting should be there", found)
	}
}

// help are the flags that `cri-dockerd <command> --help` lists for that command alone, with their
// defaults.
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
		t.Fatalf("%q lists no flags:\n%s", args, out)
	}

	return flags
}

// plain is a default without the quotes and brackets in which it is shown.
func plain(s string) string { return strings.Trim(s, "\"[]`") }

var flagRow = regexp.MustCompile("(?m)^\\| `(?:([a-z-]+) )?--([a-z0-9-]+)`[^|]*\\| ([^|]*) \\|")

// subcommands are those with flags of their own.
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

// TestFlags: docs/flags.md has every flag of the program with its default, and no other.
func TestFlags(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "docs/flags.md"))
	if err != nil {
		t.Fatal(err)
	}

	told := map[string]map[string]string{"": {}}
	for _, c := range subcommands(t) {
		told[c] = map[string]string{}
	}

	for _, m := range flagRow.FindAllStringSubmatch(string(b), -1) {
		if told[m[1]] == nil {
			t.Errorf("docs/flags.md has the command %s, which is not there", m[1])
			continue
		}

		if _, twice := told[m[1]][m[2]]; twice {
			t.Errorf("docs/flags.md has --%s twice", m[2])
		}

		told[m[1]][m[2]] = plain(strings.Trim(m[3], "`"))
	}

	for command, flags := range told {
		actual := help(t, command)
		if command != "" {
			delete(actual, "help")
		}

		for name, value := range actual {
			if v, ok := flags[name]; !ok {
				t.Errorf("docs/flags.md lacks %s --%s", command, name)
			} else if v != value && name != "help" {
				t.Errorf("docs/flags.md says that the default of %s --%s is %q, it is %q", command, name, v, value)
			}
		}

		for name := range flags {
			if _, ok := actual[name]; !ok {
				t.Errorf("docs/flags.md has %s --%s, which is not there", command, name)
			}
		}
	}
}

// TestSettings: flags in the settings that the pages show are the daemon's.
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
					t.Errorf("%s:%d: --%s is no flag", p.path, b.line, m[1])
				}
			}
		}
	}
}
