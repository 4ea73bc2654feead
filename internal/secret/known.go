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

// encoders are the ways in which programs write a text into another one.
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

// plainJSON is JSON as most languages write it, without Go's escapes for HTML.
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

// maxNested is the length in bytes of a secret up to which two encodings within each other are
// looked for. Registry tokens have 1 to 4 KiB.
const maxNested = 8 << 10

// encoded are the forms of the known secrets, each encoded up to twice, the longest first, as they
// stand in a text without line ends. A secret of fewer than shortest bytes is left out: masking it
// would garble any text.
func encoded(known []string) []string {
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

// joinLines is a text without line ends and the white space around them.
func joinLines(s string) string {
	if !strings.ContainsAny(s, "\r\n") {
		return s
	}
	return lineEnd.ReplaceAllString(s, "")
}

// span is a part of a text.
type span struct{ from, to int }

// maskKnown hides known secrets, also where line ends split them. Of a text that is not whole the
// end may be the beginning of a secret.
func maskKnown(text string, known []string, whole bool) string {
	forms := encoded(known)
	if len(forms) == 0 {
		return text
	}

	joined, offsets := joinedLines(text)
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
		if hides(joined[run[0]:run[1]], forms, nesting) {
			found = append(found, span{offsets[run[0]], offsets[run[1]-1] + 1})
		}
	}

	if n := len(joined); !whole && n > 0 {
		if begun := beginning(joined, forms); begun < n {
			found = append(found, span{offsets[begun], len(text)})
		}
	}

	return hide(text, found)
}

// beginning is where the end of a text that was cut off may begin a secret: one of the forms, or
// base64 of any.
func beginning(text string, forms []string) int {
	begin := len(strings.TrimRightFunc(text, func(r rune) bool {
		return r < utf8.RuneSelf && base64Run.MatchString(strings.Repeat(string(r), 8))
	}))
	for _, f := range forms {
		for n := min(len(f), len(text)); n >= shortest; n-- {
			if strings.HasSuffix(text, f[:n]) {
				begin = min(begin, len(text)-n)
				break
			}
		}
	}

	return begin
}

// joinedLines is joinLines with the offset in s of each byte.
func joinedLines(s string) (string, []int) {
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

// hide replaces parts of a text.
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

// base64Run is what may be base64, in either alphabet (RFC 4648).
var base64Run = regexp.MustCompile(`[A-Za-z0-9+/_-]{8,}={0,2}`)

// nesting is how often base64 is looked for within base64: Docker's header is base64 of JSON with a
// field of base64.
const nesting = 2

// hides says whether base64 holds one of the forms, or has the shape of credentials.
func hides(run string, forms []string, depth int) bool {
	run = strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(run)
	for shift := range min(4, len(run)) { // a path may stand before it
		part := run[shift:]
		plain, err := base64.RawURLEncoding.DecodeString(part[:len(part)-len(part)%4])
		if rest, restErr := base64.RawURLEncoding.DecodeString(part); restErr == nil {
			plain, err = rest, nil
		}
		if err != nil || !mostlyText(plain) {
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
				if hides(inner, forms, depth-1) {
					return true
				}
			}
		}
	}

	return false
}

// mostlyText tells a decoded text from the bytes that an ordinary word, such as a digest, decodes
// to.
func mostlyText(b []byte) bool {
	odd := 0
	for _, r := range string(b) {
		if r == utf8.RuneError || r < ' ' && r != '\n' && r != '\t' && r != '\r' {
			odd++
		}
	}
	return odd*8 <= len(b)
}
