package secret

import (
	"encoding/base64"
	"encoding/json"
	"html"
	"net/url"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// encoders are the encodings applied by programs when they embed a text in another one.
var encoders = []func(string) string{
	func(s string) string { return s },
	encodeJSON,
	func(s string) string { return strings.ReplaceAll(encodeJSON(s), "/", `\/`) }, // PHP, Python's simplejson
	plainJSON,
	func(s string) string { return strings.ReplaceAll(plainJSON(s), "/", `\/`) },
	func(s string) string { return trimQuotes(strconv.Quote(s)) },
	func(s string) string { return trimQuotes(strconv.QuoteToASCII(s)) },
	url.QueryEscape,
	url.PathEscape,
	func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }, // encodeURIComponent
	func(s string) string { return lowerEscapes(url.QueryEscape(s)) },
	func(s string) string { return lowerEscapes(url.PathEscape(s)) },
	html.EscapeString,
	func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	func(s string) string { return base64.URLEncoding.EncodeToString([]byte(s)) },
	func(s string) string { return base64.RawStdEncoding.EncodeToString([]byte(s)) },
	func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) },
}

func encodeJSON(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return s
	}
	return trimQuotes(string(b))
}

// plainJSON encodes JSON as most languages do, without Go's HTML escapes.
func plainJSON(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if e.Encode(s) != nil {
		return s
	}
	return trimQuotes(strings.TrimSuffix(b.String(), "\n"))
}

func trimQuotes(s string) string { return s[1 : len(s)-1] }

var escape = regexp.MustCompile(`%[0-9A-F]{2}`)

func lowerEscapes(s string) string { return escape.ReplaceAllStringFunc(s, strings.ToLower) }

// maxNested is the maximum length, in bytes, of a secret to search for in two nested encodings.
// Registry tokens have 1 to 4 KiB.
const maxNested = 8 << 10

// encodeKnown returns the forms of the known secrets, encoded up to twice and without line ends,
// longest first. It ignores secrets shorter than shortest bytes, because masking them would garble
// any text.
func encodeKnown(known []string) []string {
	all := map[string]bool{}
	for _, k := range known {
		if len(k) < shortest {
			continue
		}

		valid := strings.ToValidUTF8(k, "\uFFFD")
		inner := encoders
		if len(k) > maxNested {
			inner = encoders[:1]
		}

		for _, once := range inner {
			for _, twice := range encoders {
				for _, form := range []string{twice(once(k)), twice(once(valid))} {
					if form = joinLines(form); len(form) >= shortest {
						all[form] = true
					}
				}
			}
		}
	}

	out := make([]string, 0, len(all))
	for f := range all {
		out = append(out, f)
	}

	sort.Slice(out, func(i, j int) bool {
		return len(out[i]) > len(out[j]) || len(out[i]) == len(out[j]) && out[i] < out[j]
	})

	return out
}

var lineEnd = regexp.MustCompile(`[ \t]*[\r\n]+[ \t]*`)

// joinLines returns a text without line ends and the surrounding white space.
func joinLines(s string) string {
	if !strings.ContainsAny(s, "\r\n") {
		return s
	}
	return lineEnd.ReplaceAllString(s, "")
}

// span is a part of a text, as byte offsets.
type span struct{ from, to int }

// maskKnown masks known secrets, even those split by line ends. If the text is truncated, it also
// masks a possible start of a secret at the end.
func maskKnown(text string, known []string, whole bool) string {
	forms := encodeKnown(known)
	if len(forms) == 0 {
		return text
	}

	joined, offsets := joinWithOffsets(text)
	var found []span
	for _, f := range forms {
		for at := 0; ; {
			i := strings.Index(joined[at:], f)
			if i < 0 {
				break
			}
			found = append(found, span{offsets[at+i], offsets[at+i+len(f)-1] + 1})
			at += i + 1
		}
	}

	for _, run := range base64Run.FindAllStringIndex(joined, -1) {
		if hasSecret(joined[run[0]:run[1]], forms, nesting) {
			found = append(found, span{offsets[run[0]], offsets[run[1]-1] + 1})
		}
	}

	if n := len(joined); !whole && n > 0 {
		if start := findTruncated(joined, forms); start < n {
			found = append(found, span{offsets[start], len(text)})
		}
	}

	return hide(text, found)
}

// findTruncated returns the offset of a possible truncated secret at the end of a text: the start
// of one of the forms, or of any base64. Without one it returns the text's length.
func findTruncated(text string, forms []string) int {
	start := len(strings.TrimRightFunc(text, func(r rune) bool {
		return r < utf8.RuneSelf && base64Run.MatchString(strings.Repeat(string(r), 8))
	}))
	for _, f := range forms {
		for n := min(len(f), len(text)); n >= shortest; n-- {
			if strings.HasSuffix(text, f[:n]) {
				start = min(start, len(text)-n)
				break
			}
		}
	}

	return start
}

// joinWithOffsets does the same as joinLines and also returns each byte's offset in s.
func joinWithOffsets(s string) (string, []int) {
	var b strings.Builder
	offsets := make([]int, 0, len(s))
	add := func(from, to int) {
		b.WriteString(s[from:to])
		for i := from; i < to; i++ {
			offsets = append(offsets, i)
		}
	}

	at := 0
	for _, end := range lineEnd.FindAllStringIndex(s, -1) {
		add(at, end[0])
		at = end[1]
	}

	add(at, len(s))

	return b.String(), offsets
}

// hide replaces the given parts of a text.
func hide(text string, parts []span) string {
	if len(parts) == 0 {
		return text
	}

	slices.SortFunc(parts, func(a, b span) int { return a.from - b.from })
	var b strings.Builder
	at := 0
	for i := 0; i < len(parts); {
		p := parts[i]
		for i++; i < len(parts) && parts[i].from < p.to; i++ {
			p.to = max(p.to, parts[i].to)
		}
		b.WriteString(text[at:p.from])
		b.WriteString(hidden)
		at = p.to
	}

	b.WriteString(text[at:])

	return b.String()
}

// base64Run matches possible base64 in either alphabet (RFC 4648).
var base64Run = regexp.MustCompile(`[A-Za-z0-9+/_-]{8,}={0,2}`)

// nesting is the number of nested base64 layers to decode. Docker's header is base64 of JSON with a
// base64 field.
const nesting = 2

// hasSecret reports whether a base64 run contains one of the forms or any credential shape.
func hasSecret(run string, forms []string, depth int) bool {
	run = strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(run)
	for shift := range min(4, len(run)) { // a path may stand before it
		part := run[shift:]
		plain, err := base64.RawURLEncoding.DecodeString(part[:len(part)-len(part)%4])
		if rest, restErr := base64.RawURLEncoding.DecodeString(part); restErr == nil {
			plain, err = rest, nil
		}
		if err != nil || !isMostlyText(plain) {
			continue
		}

		text := joinLines(string(plain))
		for _, f := range forms {
			if strings.Contains(text, f) {
				return true
			}
		}

		if maskForms(text) != text {
			return true
		}

		if depth > 1 {
			for _, inner := range base64Run.FindAllString(text, -1) {
				if hasSecret(inner, forms, depth-1) {
					return true
				}
			}
		}
	}

	return false
}

// isMostlyText reports whether decoded bytes are text. An ordinary word, such as a digest, decodes
// to random bytes.
func isMostlyText(b []byte) bool {
	odd := 0
	for _, r := range string(b) {
		if r == utf8.RuneError || r < ' ' && r != '\n' && r != '\t' && r != '\r' {
			odd++
		}
	}
	return odd*8 <= len(b)
}
