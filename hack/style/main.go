// Command style measures the layout and the language of the repository and fails where a limit of
// CONTRIBUTING.md is exceeded. With -list it prints each finding as path:line.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// Limits of CONTRIBUTING.md. Widths are in columns, and a tab is four of them.
const (
	maxCodeWidth    = 120
	maxCommentWidth = 100
	tabWidth        = 4

	longFunction   = 15   // lines from which a function must have a blank line
	maxDense       = 0.10 // of the long functions may have none
	maxPronouns    = 15.0 // relative pronouns in 1,000 words of comments
	maxBannedWords = 0
)

// report is what was measured in all files.
type report struct {
	wideLines    int
	wideComments int
	functions    int // long ones
	dense        int // long ones without a blank line
	words        int // of comments
	pronouns     int
	banned       int // words of the table in CONTRIBUTING.md
	list         bool
}

func main() {
	list := flag.Bool("list", false, "print each finding")
	flag.Parse()

	r := report{list: *list}
	if err := r.measure(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "style:", err)
		os.Exit(2)
	}
	if !r.print() {
		os.Exit(1)
	}
}

// measure reads the tracked Go and Markdown files below the paths, all if there are none.
func (r *report) measure(paths []string) error {
	out, err := exec.Command("git", append([]string{"ls-files", "-z", "--"}, paths...)...).Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}

	var failed error
	for _, path := range strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		content, err := os.ReadFile(path) //nolint:gosec // a tracked file of this repository
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}

		switch filepath.Ext(path) {
		case ".go":
			if !isGenerated(content) {
				failed = errors.Join(failed, r.goFile(path, content))
			}
		case ".md":
			r.page(path, string(content))
		}
	}

	return failed
}

// isGenerated reports whether a Go file has the mark of generated code (go help generate).
func isGenerated(content []byte) bool {
	const mark = "// Code generated "
	return bytes.HasPrefix(content, []byte(mark)) || bytes.Contains(content, []byte("\n"+mark))
}

// page finds banned words in a Markdown page, outside of code and of the table that bans them.
func (r *report) page(path, content string) {
	if isQuoted(path) {
		return
	}

	fenced := false
	for i, line := range strings.Split(content, "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
			continue
		}
		if !fenced {
			r.prose(path, i+1, withoutCode(line))
		}
	}
}

// isQuoted reports whether a page quotes the banned words: the table itself.
func isQuoted(path string) bool {
	return path == "CONTRIBUTING.md" || strings.HasPrefix(path, "docs/zh/")
}

// withoutCode cuts `code` out of a line of Markdown.
func withoutCode(line string) string {
	var kept strings.Builder
	for i, part := range strings.Split(line, "`") {
		if i%2 == 0 {
			kept.WriteString(part + " ")
		}
	}

	return kept.String()
}

// print writes the values with their limits and reports whether all hold.
func (r *report) print() bool {
	dense := float64(r.dense) / float64(max(r.functions, 1))
	pronouns := 1000 * float64(r.pronouns) / float64(max(r.words, 1))
	ok := true
	row := func(name, value, limit string, holds bool) {
		mark := ""
		if !holds {
			mark, ok = "  <- too many", false
		}
		fmt.Printf("%-58s %10s %10s%s\n", name, value, limit, mark)
	}

	row("lines of more than 120 columns", fmt.Sprint(r.wideLines), "0", r.wideLines == 0)
	row("comment lines of more than 100 columns", fmt.Sprint(r.wideComments), "0", r.wideComments == 0)
	row(fmt.Sprintf("functions of %d lines and more without a blank line", longFunction),
		fmt.Sprintf("%.1f %%", 100*dense), fmt.Sprintf("%.0f %%", 100*maxDense), dense <= maxDense)
	row("relative pronouns in 1,000 words of comments", fmt.Sprintf("%.1f", pronouns),
		fmt.Sprintf("%.0f", maxPronouns), pronouns <= maxPronouns)
	row("banned words in comments, names, messages and docs", fmt.Sprint(r.banned), fmt.Sprint(maxBannedWords),
		r.banned <= maxBannedWords)
	return ok
}

// columns is the width of a line.
func columns(line string) int {
	return utf8.RuneCountInString(line) + (tabWidth-1)*strings.Count(line, "\t")
}

func (r *report) found(path string, line int, what string) {
	if r.list {
		fmt.Printf("%s:%d: %s\n", path, line, what)
	}
}
