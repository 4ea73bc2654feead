package docs

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// maxWidth is the width of Markdown prose, maxRowWidth that of a table row, in columns. A Chinese
// character takes two columns.
const (
	maxWidth    = 120
	maxRowWidth = 160
)

// allPages are the paths of all Markdown pages of the repository.
func allPages(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}

	return all
}

func readText(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	return string(b)
}

// TestWidths: prose is wrapped, and table rows fit a screen. Code blocks, link targets and headings
// have any width.
func TestWidths(t *testing.T) {
	for _, path := range allPages(t) {
		inFence := false
		for i, line := range strings.Split(readText(t, path), "\n") {
			limit := maxWidth
			switch text := strings.TrimSpace(line); {
			case strings.HasPrefix(text, "```"):
				inFence = !inFence
				continue
			case inFence || strings.HasPrefix(text, "#"):
				continue
			case strings.HasPrefix(text, "|"):
				limit = maxRowWidth
			}

			if w := displayWidth(line); w > limit && len(strings.Fields(line)) > 1 {
				t.Errorf("%s:%d has %d columns, at most %d are allowed", path, i+1, w, limit)
			}
		}
	}
}

// displayWidth counts a character outside of Latin scripts and punctuation twice.
func displayWidth(s string) int {
	wide := 0
	for _, c := range s {
		if c >= 0x2E80 { // CJK Radicals Supplement, the first block of wide characters
			wide++
		}
	}

	return utf8.RuneCountInString(s) + wide
}

var (
	testName    = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w*\*?`)
	declaration = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	sourceFile  = regexp.MustCompile("`([a-z][a-z0-9_/]*\\.go)`")
)

// testNames are the names of the tests and fuzz targets of each directory of the repository.
func testNames(t *testing.T) map[string][]string {
	t.Helper()
	names := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}

		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range declaration.FindAllStringSubmatch(readText(t, path), -1) {
			names[dir] = append(names[dir], m[1])
		}

		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	return names
}

// hasTest reports whether names has a test. TestWalk* stands for any with this prefix.
func hasTest(names []string, name string) bool {
	prefix, isPattern := strings.CutSuffix(name, "*")
	return slices.ContainsFunc(names, func(n string) bool {
		return n == name || isPattern && strings.HasPrefix(n, prefix)
	})
}

// TestNamedTestsExist: every test named on a page exists.
func TestNamedTestsExist(t *testing.T) {
	known := slices.Concat(slices.Collect(maps.Values(testNames(t)))...)
	for _, path := range allPages(t) {
		for _, name := range testName.FindAllString(readText(t, path), -1) {
			if !hasTest(known, name) {
				t.Errorf("%s names %s, which does not exist", path, name)
			}
		}
	}
}

// proofs finds the tests of a package in the forms "`view: TestHeartbeat, TestSilentStream`" and
// "- `view`: TestHeartbeat, TestSilentStream".
var proofs = regexp.MustCompile("`([a-z0-9/]+)(?:: ([^`]+)`|`: ((?:Test|Fuzz)[^\n]+(?:\n  [^\n]+)*))")

// TestNamedTestsAreInTheirPackage: a test is in the package given on the page.
func TestNamedTestsAreInTheirPackage(t *testing.T) {
	known := testNames(t)
	found := 0
	for _, path := range allPages(t) {
		for _, m := range proofs.FindAllStringSubmatch(readText(t, path), -1) {
			var here []string
			for _, parent := range []string{"internal", "test", "internal/logs"} {
				here = append(here, known[filepath.Join(parent, m[1])]...)
			}

			for _, name := range testName.FindAllString(m[2]+m[3], -1) {
				found++
				if !hasTest(here, name) {
					t.Errorf("%s: package %s has no %s", path, m[1], name)
				}
			}
		}
	}

	if found < 100 {
		t.Errorf("only %d tests were found", found)
	}
}

// TestNamedFilesExist: the source files of ARCHITECTURE.md exist, by their path in the repository
// or below internal.
func TestNamedFilesExist(t *testing.T) {
	page := readText(t, filepath.Join(root, "ARCHITECTURE.md"))
	found := sourceFile.FindAllStringSubmatch(page, -1)
	for _, m := range found {
		if strings.HasPrefix(m[1], "noun_verb") || m[1] == "metrics.go" {
			continue // a form of names
		}

		_, err := os.Stat(filepath.Join(root, m[1]))
		if err != nil {
			_, err = os.Stat(filepath.Join(root, "internal", m[1]))
		}
		if err != nil {
			t.Errorf("ARCHITECTURE.md names %s: %v", m[1], err)
		}
	}

	if len(found) < 20 {
		t.Errorf("ARCHITECTURE.md names %d files", len(found))
	}
}

// TestLinksOfTopPages: links of the pages in the root directory lead to files.
func TestLinksOfTopPages(t *testing.T) {
	links := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, path := range allPages(t) {
		if filepath.Dir(path) != root {
			continue
		}

		for _, m := range links.FindAllStringSubmatch(readText(t, path), -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), target)); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

// TestChineseReadme: README.zh.md has the code blocks of README.md, word for word.
func TestChineseReadme(t *testing.T) {
	fence := regexp.MustCompile("(?ms)^```.*?^```$")
	want := fence.FindAllString(readText(t, filepath.Join(root, "README.md")), -1)
	if got := fence.FindAllString(readText(t, filepath.Join(root, "README.zh.md")), -1); !slices.Equal(got, want) {
		t.Errorf("have %q, want %q", got, want)
	}
}
