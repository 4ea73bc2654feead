// Package text makes strings from outside fit for responses, errors and logs: valid UTF-8, without
// control characters, of bounded length. gRPC rejects a whole response for one invalid byte, and a
// terminal obeys escape sequences. So Clean processes every string not written by this program.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits in bytes for the kinds of outside strings.
const (
	MaxName    = 1 << 10 // names of devices, users, images
	MaxMessage = 4 << 10 // messages of the engine, plugins and registries
)

// mark replaces truncated text.
const mark = "…"

// Clean returns s as valid UTF-8 of at most limit bytes. Invalid bytes become U+FFFD. Control
// characters other than newline and tab, and characters with a change of text direction, become
// spaces. A truncated string ends with "…"; a limit below the size of the mark returns "".
func Clean(s string, limit int) string {
	if len(s) <= limit && isClean(s) {
		return s
	}
	if limit < len(mark) {
		return ""
	}

	var b strings.Builder
	end := 0 // length up to the last position for a mark
	for _, r := range s {
		if !isPrintable(r) {
			r = ' '
		}
		if b.Len()+utf8.RuneLen(r) > limit {
			return b.String()[:end] + mark
		}

		b.WriteRune(r)
		if b.Len() <= limit-len(mark) {
			end = b.Len()
		}
	}

	return b.String()
}

func isClean(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}

	for _, r := range s {
		if !isPrintable(r) {
			return false
		}
	}

	return true
}

// isPrintable rejects control characters and bidirectional controls, since they can disguise a line
// as another.
func isPrintable(r rune) bool {
	if r == '\n' || r == '\t' {
		return true
	}
	return !unicode.IsControl(r) && !unicode.Is(unicode.Bidi_Control, r)
}
