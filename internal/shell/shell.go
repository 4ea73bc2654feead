// Package shell builds command lines and advice for an operator to paste. A line consists of a
// constant of this program and of words, and Quote quotes every word. Foreign strings, such as
// arguments of processes or names of files, cannot become syntax: the parameters for syntax accept
// constants only.
package shell

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"cri-dockerd/internal/text"
)

// MaxWord is the maximum length of a word in bytes, equal to PATH_MAX of Linux.
const MaxWord = 4096

// maxShown is the maximum length of a word in the result of Show, in bytes.
const maxShown = 256

// refused replaces a command with a word that cannot be quoted safely.
const refused = "no command available: an argument contains control characters, is too long, " +
	"or would be parsed as an option"

// Errors of Quote and of operands.
var (
	errEncoding = errors.New("the word is not valid UTF-8")
	errControl  = errors.New("the word has unprintable characters")
	errLength   = errors.New("the word is too long")
	errOption   = errors.New("the word would be parsed as an option")
)

// constant is a string constant of this program. Outside this package, only untyped constants
// convert to it.
type constant string

// Line is a command line, or advice if no command exists. The zero Line is absent.
type Line struct {
	text string
	err  error // why a word was refused
}

// Command returns a command line. It replaces each "{}" of format with a quoted word. A word after
// a space or at the start is an operand and must not begin with "-". Words after other characters,
// as in "--name={}", may do so.
func Command(format constant, words ...string) Line {
	return build(string(format), words, func(word string, operand bool) (string, error) {
		if operand && strings.HasPrefix(word, "-") {
			return "", errOption
		}
		return Quote(word)
	})
}

// Advice returns a sentence. It replaces each "{}" of format with a word, quoted like in a command
// line so that parts of the sentence can be pasted, or formatted by Show if Quote refuses the word.
// format must not contain an apostrophe before a placeholder, because it would start a quotation.
func Advice(format constant, words ...string) Line {
	return build(string(format), words, func(word string, _ bool) (string, error) {
		if quoted, err := Quote(word); err == nil && len(word) <= maxShown {
			return quoted, nil
		}
		return Show(word), nil
	})
}

// Run returns the command line of a program with options, each written as --name=value.
func Run(program string, options ...Option) Line {
	l := Command("{}", program)
	for _, o := range options {
		name := strings.Trim(o.Name, "abcdefghijklmnopqrstuvwxyz0123456789-")
		value, err := Quote(o.Value)
		if name != "" || o.Name == "" {
			err = errOption
		}
		l.text += " --" + o.Name + "=" + value
		l.err = errors.Join(l.err, err)
	}

	return l
}

// Option is a long option of a command. Its name consists of a-z, 0-9 and "-".
type Option struct{ Name, Value string }

func build(format string, words []string, quote func(word string, operand bool) (string, error)) Line {
	var l Line
	var b strings.Builder
	for {
		before, after, found := strings.Cut(format, "{}")
		b.WriteString(before)
		if !found {
			break
		}
		if quotes := strings.Count(before, "'") + strings.Count(before, `"`); quotes%2 != 0 {
			l.err = errors.Join(l.err, errors.New("a placeholder is inside quotes"))
		}

		word := ""
		if len(words) > 0 {
			word, words = words[0], words[1:]
		} else {
			l.err = errors.Join(l.err, errors.New("a word is missing"))
		}

		alone := before == "" && b.Len() == 0 || strings.HasSuffix(before, " ")
		quoted, err := quote(word, alone)
		b.WriteString(quoted)
		l.err = errors.Join(l.err, err)
		format = after
	}

	if len(words) > 0 {
		l.err = errors.Join(l.err, errors.New("more words than placeholders"))
	}

	l.text = b.String()

	return l
}

// Args returns the line with additional quoted operands.
func (l Line) Args(words ...string) Line {
	for _, w := range words {
		next := Command(" {}", w)
		l = Line{l.text + next.text, errors.Join(l.err, next.err)}
	}
	return l
}

// With returns the line followed by a space and the result of Command.
func (l Line) With(format constant, words ...string) Line {
	return l.join(" ", Command(format, words...))
}

// And returns a line to run l and, if l succeeds, next. It omits an absent line.
func (l Line) And(next Line) Line { return l.join(" && ", next) }

// Then returns a line to run l, then next.
func (l Line) Then(next Line) Line { return l.join("; ", next) }

// Detached returns a line to run l in the background, independent of the terminal, with its output
// appended to the file log.
func (l Line) Detached(log constant) Line {
	return Line{"nohup " + l.text + " >>" + string(log) + " 2>&1 &", l.err}
}

// Note returns the line with a comment at its end.
func (l Line) Note(comment constant) Line { return Line{l.text + "  # " + string(comment), l.err} }

func (l Line) join(operator string, next Line) Line {
	switch {
	case l.IsZero():
		return next
	case next.IsZero():
		return l
	}
	return Line{l.text + operator + next.text, errors.Join(l.err, next.err)}
}

// IsZero reports whether there is no line.
func (l Line) IsZero() bool { return l.text == "" && l.err == nil }

// Err returns the reason for a refused word, nil if there is none.
func (l Line) Err() error { return l.err }

// String returns the line to print. After a refused word, it is a message without any command.
func (l Line) String() string {
	if l.err != nil {
		return refused
	}
	return l.text
}

// MarshalText is String, for JSON.
func (l Line) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Quote returns s as one word of a POSIX shell's command line. It returns an error for words unsafe
// to print and paste even with quotes: invalid UTF-8, unprintable characters (terminals obey escape
// sequences, and a line break runs the command), and words longer than MaxWord.
func Quote(s string) (string, error) {
	switch {
	case len(s) > MaxWord:
		return "", errLength
	case !utf8.ValidString(s):
		return "", errEncoding
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "", errControl
	case s != "" && !strings.ContainsFunc(s, special):
		return s, nil
	}

	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'", nil
}

// special reports whether a character requires quotes.
func special(r rune) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	return !strings.ContainsRune(letters+"/.:,-_=@%+", r)
}

// Show returns a foreign string for use in a sentence: on one line, bounded, and quoted, so that it
// remains one word if it is pasted. A space replaces each unprintable character.
func Show(s string) string {
	printable := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text.Clean(s, maxShown))

	quoted, err := Quote(printable)
	if err != nil {
		return "''" // unreachable: Quote accepts every printable word of this length
	}

	return quoted
}

// IsPlain reports whether a value is safe in a file or in an expression of sed without quotes:
// letters, digits and "/.:,-_=@%+", at most 256 characters.
func IsPlain(s string) bool {
	return s != "" && len(s) <= maxShown && !strings.ContainsFunc(s, special)
}
