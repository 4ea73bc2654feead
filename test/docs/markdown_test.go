// Package docs tests the documentation. Every command must be run by a test or have a reason not to
// be run, flags and errors must match the program, and links must work. docs/README.md describes
// the marks of code blocks. The package has tests only.
package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// page is one Markdown file.
type page struct {
	path   string // relative to the repository
	titles []string
	links  []link
	blocks []block

	problems []string // forbidden syntax, which could hide commands
}

type link struct {
	target string
	line   int
}

// block is a fenced piece of code.
type block struct {
	language string
	marks    map[string]string // from the first line: run=node, not-run="a reason"
	text     string
	line     int
	title    string // of the section
}

// pages returns README.md and all pages below docs, in the order of their paths.
func pages(t *testing.T) []*page {
	t.Helper()
	files := []string{"README.md"}
	for _, pattern := range []string{"docs/*.md", "docs/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}

		for _, f := range found {
			rel, err := filepath.Rel(root, f)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, rel)
		}
	}

	var all []*page
	for _, f := range files {
		all = append(all, read(t, f))
	}

	return all
}

var (
	linkPattern = regexp.MustCompile(`\[[^\]]*\]\(([^)\s]+)\)`)
	markPattern = regexp.MustCompile(`([a-z-]+)=("[^"]*"|\S+)`)
	codePattern = regexp.MustCompile("`[^`]*`")
)

// read parses the Markdown syntax of these pages. It reports ambiguous syntax as problems: indented
// code blocks and fences without a language.
func read(t *testing.T, path string) *page {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}

	p := &page{path: path}
	var open *block
	blank := true
	for i, l := range strings.Split(string(b), "\n") {
		fence, isFence := strings.CutPrefix(strings.TrimSpace(l), "```")
		switch {
		case isFence && open != nil:
			p.blocks = append(p.blocks, *open)
			open = nil
		case isFence:
			open = newBlock(fence, i+1, p.titles)
			if open.language == "" {
				p.problems = append(p.problems,
					fmt.Sprintf("%s:%d: fence without a language; use sh for commands, or text, yaml, json, …",
						path, i+1))
			}

		case open != nil:
			open.text += l + "\n"
		case strings.HasPrefix(l, "<<<<<<< "):
			p.problems = append(p.problems, fmt.Sprintf("%s:%d: unresolved merge conflict", path, i+1))
		case strings.HasPrefix(l, "#"):
			p.titles = append(p.titles, l)
		case blank && strings.HasPrefix(l, "    ") && strings.TrimSpace(l) != "":
			p.problems = append(p.problems, fmt.Sprintf("%s:%d: indented code block; use a fence", path, i+1))
		default:
			for _, m := range linkPattern.FindAllStringSubmatch(codePattern.ReplaceAllString(l, ""), -1) {
				p.links = append(p.links, link{m[1], i + 1})
			}
		}

		blank = strings.TrimSpace(l) == ""
	}

	if open != nil {
		p.problems = append(p.problems, fmt.Sprintf("%s:%d: unterminated fence", path, open.line))
	}

	return p
}

func newBlock(info string, line int, titles []string) *block {
	language, marks, _ := strings.Cut(info, " ")
	b := &block{language: language, marks: map[string]string{}, line: line}
	for _, m := range markPattern.FindAllStringSubmatch(marks, -1) {
		b.marks[m[1]] = strings.Trim(m[2], `"`)
	}

	if len(titles) > 0 {
		b.title = titles[len(titles)-1]
	}

	return b
}

// isCommands reports whether a block has shell commands.
func (b block) isCommands() bool {
	return slices.Contains([]string{"sh", "bash", "shell", "console", "zsh"}, b.language)
}

// lines returns the commands of a block without comments and with continuation lines joined.
func (b block) lines() []string {
	var all []string
	for l := range strings.SplitSeq(strings.ReplaceAll(b.text, "\\\n", " "), "\n") {
		l, _, _ = strings.Cut(l, "  #")
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "#") {
			all = append(all, l)
		}
	}

	return all
}

var noAnchor = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)

// anchors returns the anchors of a page's headings, like GitHub and most site generators.
func (p *page) anchors() []string {
	var all []string
	for _, title := range p.titles {
		text := strings.ToLower(strings.TrimSpace(strings.TrimLeft(title, "#")))
		all = append(all, strings.ReplaceAll(noAnchor.ReplaceAllString(text, ""), " ", "-"))
	}
	return all
}
