package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"unicode"
)

// source is a parsed Go file.
type source struct {
	path  string
	lines []string
	files *token.FileSet
	ast   *ast.File
}

// goFile measures a Go file.
func (r *report) goFile(path string, content []byte) error {
	files := token.NewFileSet()
	parsed, err := parser.ParseFile(files, path, content, parser.ParseComments)
	if err != nil {
		return fmt.Errorf("parse: %w", err)
	}

	s := &source{
		path:  path,
		lines: strings.Split(string(content), "\n"),
		files: files,
		ast:   parsed,
	}
	r.widths(s)
	r.density(s)
	r.comments(s)
	r.names(s)

	return nil
}

// widths counts wide lines. Data in raw strings that goes over several lines is not code.
func (r *report) widths(s *source) {
	data := s.rawLines()
	for i, line := range s.lines {
		text := strings.TrimSpace(line)
		isComment := strings.HasPrefix(text, "//") && !strings.HasPrefix(text, "//go:")
		switch {
		case data[i+1]:
		case isComment && columns(line) > maxCommentWidth:
			r.wideComments++
			r.found(s.path, i+1, fmt.Sprintf("comment of %d columns", columns(line)))
		case columns(line) > maxCodeWidth:
			r.wideLines++
			r.found(s.path, i+1, fmt.Sprintf("line of %d columns", columns(line)))
		}
	}
}

// rawLines returns the lines that begin inside a raw string.
func (s *source) rawLines() map[int]bool {
	raw := map[int]bool{}
	ast.Inspect(s.ast, func(n ast.Node) bool {
		if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING && l.Value[0] == '`' {
			for line := s.line(l.Pos()) + 1; line <= s.line(l.End()); line++ {
				raw[line] = true
			}
		}
		return true
	})

	return raw
}

// density counts long functions, and those of them without a blank line.
func (r *report) density(s *source) {
	for _, d := range s.ast.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Body == nil {
			continue
		}

		first, last := s.line(f.Pos()), s.line(f.End())
		if last-first+1 < longFunction {
			continue
		}

		r.functions++
		if !s.hasBlankLine(first, last) {
			r.dense++
			r.found(s.path, first, "long function without a blank line")
		}
	}
}

func (s *source) hasBlankLine(first, last int) bool {
	for _, line := range s.lines[first-1 : last] {
		if strings.TrimSpace(line) == "" {
			return true
		}
	}

	return false
}

// comments counts words, relative pronouns and banned words of comments.
func (r *report) comments(s *source) {
	for _, group := range s.ast.Comments {
		for _, c := range group.List {
			if strings.HasPrefix(c.Text, "//go:") || strings.HasPrefix(c.Text, "//nolint") {
				continue
			}
			for i, line := range strings.Split(strings.TrimPrefix(c.Text, "//"), "\n") {
				words, pronouns := r.prose(s.path, s.line(c.Pos())+i, line)
				r.words += words
				r.pronouns += pronouns
			}
		}
	}
}

// names finds banned words in the names that a file declares and in its messages.
func (r *report) names(s *source) {
	isTest := strings.HasSuffix(s.path, "_test.go") || strings.HasPrefix(s.path, "hack/style/")
	imports := map[*ast.BasicLit]bool{}
	for _, i := range s.ast.Imports {
		imports[i.Path] = true
	}

	ast.Inspect(s.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Ident:
			if n.Obj != nil && n.Obj.Pos() == n.Pos() || s.declares(n) {
				r.name(s.path, s.line(n.Pos()), n.Name)
			}
		case *ast.BasicLit:
			if n.Kind == token.STRING && !isTest && !imports[n] {
				r.prose(s.path, s.line(n.Pos()), n.Value)
			}
		}
		return true
	})
}

// declares reports whether an identifier is the name of a function or method.
func (s *source) declares(id *ast.Ident) bool {
	for _, d := range s.ast.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Name == id {
			return true
		}
	}

	return false
}

// name finds banned words in a name, split at its capitals.
func (r *report) name(path string, line int, name string) {
	start := 0
	for i, c := range name + "A" {
		if i > 0 && (unicode.IsUpper(c) || c == '_') {
			if bannedNames[strings.ToLower(strings.Trim(name[start:i], "_"))] {
				r.banned++
				r.found(path, line, "name "+name)
			}
			start = i
		}
	}
}

func (s *source) line(p token.Pos) int { return s.files.Position(p).Line }
