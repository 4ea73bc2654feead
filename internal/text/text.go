// Package text makes strings from outside fit for answers, errors and logs: valid UTF-8, without
// control characters, of bounded length. gRPC refuses a whole answer for one invalid byte, and a
// terminal obeys escape sequences, so every string that somebody else wrote passes through Clean.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds in bytes for the kinds of strings that come from outside.
const (
	MaxName    = 1 << 10 // names of devices, users, images
	MaxMessage = 4 << 10 // messages of the engine, plugins and registries
)

// mark stands where text was cut off.
const mark = "…"

// Clean returns s as valid UTF-8 of at most limit bytes. Invalid bytes become U+FFFD. Control
// characters other than newline and tab, and characters that change the direction of text, become
// spaces. A cut is marked with "…"; a limit below the size of the mark returns "".
func Clean(s string, limit int) string {
	if len(s) <= limit && isClean(s) {
		return s
	}
	if limit < len(mark) {
		return ""
	}

	var b strings.Builder
	end := 0 // the length up to which a mark still fits
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

// Valid returns s as valid UTF-8 of at most limit bytes and keeps every valid character, for data
// that a client compares byte by byte. Invalid bytes become U+FFFD.
func Valid(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
		for i := 0; i < utf8.UTFMax && s != ""; i++ { // do not leave half a character
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
	}

	s = strings.ToValidUTF8(s, "\uFFFD")
	for len(s) > limit { // a replacement is longer than what it replaces
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}

	return s
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

// isPrintable rejects control characters and the bidirectional controls, which make a line look
// like another one.
func isPrintable(r rune) bool {
	if r == '\n' || r == '\t' {
		return true
	}
	return !unicode.IsControl(r) && !unicode.Is(unicode.Bidi_Control, r)
}
