package main

import (
	"strings"
	"unicode"
)

// pronouns introduce relative clauses. "that" counts in each of its meanings.
var pronouns = set("who whom whose which that what whoever whatever whichever")

// banned are the words of the term table in CONTRIBUTING.md that have no meaning of the field.
var banned = set("look looks looked looking looker tell tells told telling hear hears heard hearing " +
	"say says said saying figure figures patience mend mends mended mending gone news mood who whom whoever " +
	"heed heeds heeded lest nought whence thereof")

// bannedNames are those of them that stand in names.
var bannedNames = set("look looks looked looker tell tells told hear hears heard say says said figures patience mend " +
	"mends mended mending gone news mood who whom heed")

func set(words string) map[string]bool {
	s := map[string]bool{}
	for _, w := range strings.Fields(words) {
		s[w] = true
	}

	return s
}

// prose counts the words and the relative pronouns of a line and records its banned words.
func (r *report) prose(path string, line int, text string) (words, relative int) {
	isLetter := func(c rune) bool { return unicode.IsLetter(c) || c == '\'' || c == '_' }
	for _, word := range strings.FieldsFunc(text, func(c rune) bool { return !isLetter(c) }) {
		words++
		lower := strings.ToLower(word)
		if pronouns[lower] {
			relative++
		}
		if banned[lower] {
			r.banned++
			r.found(path, line, "word "+word)
		}
	}

	return words, relative
}
