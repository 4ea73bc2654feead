// Package docs proves the documentation: that every command in it is run by a test or says why it
// is not, that what it says of the program's flags and errors is what the program has, and that its
// links lead somewhere. It has no code outside its tests; docs/README.md has the marks.
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
	path   string // within the repository
	titles []string
	links  []link
	blocks []block

	problems []string // what is not permitted, since it could hide commands
}

type link struct {
	target string
	line   int
}

// block is a fenced piece of code.
type block struct {
	language string
	marks    map[string]string // the rest of the first line: run=node, not-run="a reason"
	text     string
	line     int
	title    string // the heading above it
}

// pages are README.md and all of docs, in the order of their paths.
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

// read parses as much of Markdown as these pages need. What it could misread, it does not permit:
// code that is indented instead of fenced, and fences without a language.
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
					fmt.Sprintf("%s:%d: a fence without a language; commands are sh, all else text, yaml, json, …",
						path, i+1))
			}

		case open != nil:
			open.text += l + "\n"
		case strings.HasPrefix(l, "<<<<<<< "):
			p.problems = append(p.problems, fmt.Sprintf("%s:%d: a conflict that nobody has resolved", path, i+1))
		case strings.HasPrefix(l, "#"):
			p.titles = append(p.titles, l)
		case blank && strings.HasPrefix(l, "    ") && strings.TrimSpace(l) != "":
			p.problems = append(p.problems, fmt.Sprintf("%s:%d: indented code; fence it", path, i+1))
		default:
			for _, m := range linkPattern.FindAllStringSubmatch(codePattern.ReplaceAllString(l, ""), -1) {
				p.links = append(p.links, link{m[1], i + 1})
			}
		}

		blank = strings.TrimSpace(l) == ""
	}

	if open != nil {
		p.problems = append(p.problems, fmt.Sprintf("%s:%d: the fence has no end", path, open.line))
	}

	return p
}

func newBlock(info string, line int, titles []string) *block {
	language, rest, _ := strings.Cut(info, " ")
	b := &block{language: language, marks: map[string]string{}, line: line}
	for _, m := range markPattern.FindAllStringSubmatch(rest, -1) {
		b.marks[m[1]] = strings.Trim(m[2], `"`)
	}

	if len(titles) > 0 {
		b.title = titles[len(titles)-1]
	}

	return b
}

// commands says whether a block holds what somebody types.
func (b block) commands() bool {
	return slices.Contains([]string{"sh", "bash", "shell", "console", "zsh"}, b.language)
}

// lines are the commands of a block: without comments, with continued lines as one.
func (b block) lines() []string {
	var all []string
	for l := range strings.SplitSeq(strings.ReplaceAll(b.text, "\\\n", " "), "\n") {
		if l, _, _ = strings.Cut(l, "  #"); strings.TrimSpace(l) != "" && !strings.HasPrefix(strings.TrimSpace(l),
			"#") {
			all = append(all, strings.TrimSpace(l))
		}
	}

	return all
}

var noAnchor = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)

// anchors are the names by which a page's headings can be linked to, as GitHub and most site
// generators make them.
func (p *page) anchors() []string {
	var all []string
	for _, title := range p.titles {
		text := strings.ToLower(strings.TrimSpace(strings.TrimLeft(title, "#")))
		all = append(all, strings.ReplaceAll(noAnchor.ReplaceAllString(text, ""), " ", "-"))
	}
	return all
}
