// Package secret keeps credentials out of what is told: it recognises them in texts that come from
// elsewhere, such as a registry's answer, before these reach a log, a trace or the kubelet.
package secret

import (
	"log/slog"
	"regexp"
)

// hidden stands in a secret's place.
const hidden = "***"

// shortest is the length in bytes from which a known secret is looked for in a text. A shorter one
// cannot be told from ordinary words, and to mask it would show where it stands: it is hidden only
// in the fields and headers of forms.
const shortest = 4

// fieldNames are the fields of Docker's AuthConfig and of OAuth 2 that hold credentials, as a
// regular expression.
const fieldNames = `password|passwd|auth|secret|(?:identity|registry|access|refresh|id)?_?token|client_secret`

// maxText is how many bytes of a text are read. To look for secrets takes about a microsecond for
// each.
const maxText = 64 << 10

// forms are the shapes in which credentials appear in other programs' texts, and what is left of
// them.
var forms = []struct {
	shape *regexp.Regexp
	left  string
}{
	// https://user:password@host (RFC 3986, userinfo)
	{regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#"'@]*(?:@[^\s/?#"'@]*)*@`), "${1}" + hidden + "@"},
	// Authorization: Basic …, as a header is printed by HTTP, by Go's %v and in JSON; Docker's
	// X-Registry-Auth; cookies
	{regexp.MustCompile(`(?i)\b((?:proxy-)?authorization|x-registry-(?:auth|config)|x-meta-[a-z-]*token|` +
		`(?:set-)?cookie)((?:\\?["'])?\s*[:=]\s*\[?(?:\\?["'])?)(?:[A-Za-z]+\s+)?[^\s"'\\,\]}]+`), "${1}${2}" + hidden},
	// Bearer <token> without its header's name; shorter words are prose, such as "basic
	// authentication"
	{regexp.MustCompile(`(?i)\b(basic|bearer)\s+[A-Za-z0-9+/_.~=-]{16,}`), "${1} " + hidden},
	// "password":"…", identitytoken=…: fields of Docker's AuthConfig and of OAuth 2 (RFC 6749)
	{regexp.MustCompile(`(?i)(\\"(?:` + fieldNames + `)\\"\s*:\s*\\")(?:\\\\(?:\\.|[^\\])|[^"\\])+`), "${1}" + hidden},
	{regexp.MustCompile(`(?i)("(?:` + fieldNames + `)"\s*:\s*")(?:\\.|[^"\\])+`), "${1}" + hidden},
	{regexp.MustCompile(`(?i)((?:\\?["'])(?:password|passwd|auth|secret|(?:identity|registry|access|refresh|` +
		`id)?_?token|client_secret)(?:\\?["'])\s*:\s*\\?["'])[^"'\\]+`), "${1}" + hidden},
	{regexp.MustCompile(`(?i)\b((?:password|passwd|(?:identity|registry|access|refresh|id)_?token|` +
		`client_secret)=["']?)[^\s&"',;]+`), "${1}" + hidden},
	// …?X-Amz-Signature=…&sig=…: addresses that are credentials themselves, to which registries
	// redirect
	{regexp.MustCompile(`(?i)([?&][^=&\s"']*(?:token|sig|secret|password|credential|key|auth)[^=&\s"']*=)[^&\s"'#]+`),
		"${1}" + hidden},
	// JSON Web Tokens (RFC 7519)
	{regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`), hidden},
}

// Mask is a text without what has the form of a credential, and without the known secrets: as they
// are, and as JSON, Go, URLs, HTML and base64 write them, also within each other and split over
// lines. Of a text of more than maxText bytes the rest is left out.
func Mask(text string, known ...string) string {
	whole := len(text) <= maxText
	if !whole {
		text = text[:maxText]
	}

	text = maskForms(maskKnown(text, known, whole))
	if !whole {
		text += "…"
	}

	return text
}

func maskForms(text string) string {
	for _, f := range forms {
		text = f.shape.ReplaceAllString(text, f.left)
	}
	return text
}

// Hide is an error with its text masked; its kind stays.
func Hide(err error, known ...string) error {
	if err == nil {
		return nil
	}

	text := Mask(err.Error(), known...)
	if text == err.Error() {
		return err
	}

	return discreet{text, err}
}

type discreet struct {
	text string
	err  error
}

// Error implements error.
func (d discreet) Error() string { return d.text }

// Unwrap is for errors.Is and errors.As.
func (d discreet) Unwrap() error { return d.err }

// Attr is for slog.HandlerOptions.ReplaceAttr: it masks texts and errors.
func Attr(_ []string, a slog.Attr) slog.Attr {
	switch a.Value.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(Mask(a.Value.String()))
	case slog.KindAny:
		if err, ok := a.Value.Any().(error); ok && err != nil {
			a.Value = slog.StringValue(Mask(err.Error()))
		}
	}

	return a
}
