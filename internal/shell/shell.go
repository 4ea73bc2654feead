// Package shell builds the command lines and the advice that the program prints for an operator to
// paste. A line comes from a constant of this program and from words, and every word is quoted by
// Quote. A string that somebody else wrote, such as an argument of a process or the name of a file,
// cannot become syntax: the parameters for syntax take constants only.
package shell

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"cri-dockerd/internal/text"
)

// MaxWord bounds a word of a command line in bytes; PATH_MAX of Linux is 4096.
const MaxWord = 4096

// maxShown bounds a word that Show puts into a sentence, in bytes.
const maxShown = 256

// refused stands in the place of a command with a word that cannot be quoted safely.
const refused = "no command can be suggested: a word of it has control characters, is too long " +
	"or would be read as an option"

// Errors of Quote and of operands.
var (
	errEncoding = errors.New("the word is not valid UTF-8")
	errControl  = errors.New("the word has characters that a terminal does not print")
	errLength   = errors.New("the word is too long")
	errOption   = errors.New("the word would be read as an option")
)

// constant is a string constant of this program: outside this package only untyped constants
// convert to it.
type constant string

// Line is a command line, or advice where no command can do it. The zero Line is none.
type Line struct {
	text string
	err  error // why a word of it is refused
}

// Command returns a command line. Each "{}" of format is replaced by a word, quoted. A word that is
// an operand of its own, which means that it follows a space or nothing, must not begin with "-".
// One that follows other characters, as in "--name={}", may.
func Command(format constant, words ...string) Line {
	return build(string(format), words, func(word string, operand bool) (string, error) {
		if operand && strings.HasPrefix(word, "-") {
			return "", errOption
		}
		return Quote(word)
	})
}

// Advice returns a sentence in which each "{}" is replaced by a word, quoted as in a command line,
// so that parts of the sentence can be pasted as well. Words that cannot be quoted are shown by
// Show. The sentence has no apostrophe before a place, which would quote what follows.
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
			l.err = errors.Join(l.err, errors.New("a place stands within quotes"))
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
		l.err = errors.Join(l.err, errors.New("there are more words than places"))
	}

	l.text = b.String()

	return l
}

// Args returns the line with further operands, quoted.
func (l Line) Args(words ...string) Line {
	for _, w := range words {
		next := Command(" {}", w)
		l = Line{l.text + next.text, errors.Join(l.err, next.err)}
	}
	return l
}

// With returns the line with more of it, built as by Command and separated by a space.
func (l Line) With(format constant, words ...string) Line {
	return l.join(" ", Command(format, words...))
}

// And returns the line that runs next if l succeeds. An absent line is left out.
func (l Line) And(next Line) Line { return l.join(" && ", next) }

// Then returns the line that runs next after l.
func (l Line) Then(next Line) Line { return l.join("; ", next) }

// Detached returns the line that runs in the background, survives the terminal and appends its
// output to the file log.
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

// Err is the reason why no command can be suggested, nil if one can.
func (l Line) Err() error { return l.err }

// String is the line to print. If a word was refused, it says so and contains no command.
func (l Line) String() string {
	if l.err != nil {
		return refused
	}
	return l.text
}

// MarshalText is String, for JSON.
func (l Line) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Quote returns s as one word of a POSIX shell's command line. It returns an error for words that
// no quoting makes safe to print and paste: invalid UTF-8, characters that are not printable
// (terminals obey escape sequences, and a line break runs the command), and words over MaxWord.
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

// special reports whether a character must be quoted.
func special(r rune) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	return !strings.ContainsRune(letters+"/.:,-_=@%+", r)
}

// Show returns a foreign string for a sentence: on one line, printable, bounded, and quoted, so
// that it is one word even if it is pasted. What cannot be printed is a space.
func Show(s string) string {
	printable := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text.Clean(s, maxShown))

	quoted, err := Quote(printable)
	if err != nil {
		return "''" // Quote takes every printable word of this length
	}

	return quoted
}

// IsPlain reports whether a value may stand in a file or in an expression of sed without any
// quoting: letters, digits and "/.:,-_=@%+", at most 256 characters.
func IsPlain(s string) bool {
	return s != "" && len(s) <= maxShown && !strings.ContainsFunc(s, special)
}
