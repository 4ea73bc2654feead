// Package secret keeps credentials out of published texts. It recognises them in texts from other
// programs, such as a registry's response, before these reach a log, a trace or the kubelet.
package secret

import (
	"log/slog"
	"regexp"
)

// hidden replaces a secret.
const hidden = "***"

// shortest is the minimum length, in bytes, of a known secret. A shorter one is indistinguishable
// from ordinary words, and masking it would reveal its positions. It is masked only in the fields
// and headers of forms.
const shortest = 4

// fieldNames are the credential fields of Docker's AuthConfig and of OAuth 2, as a regular
// expression.
const fieldNames = `password|passwd|auth|secret|(?:identity|registry|access|refresh|id)?_?token|client_secret`

// maxText is the limit, in bytes, on the length of a masked text. The search takes about a
// microsecond per byte.
const maxText = 64 << 10

// forms are the shapes of credentials in other programs' texts, with their replacements.
var forms = []struct {
	shape       *regexp.Regexp
	replacement string
}{
	// https://user:password@host (RFC 3986, userinfo)
	{regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#"'@]*(?:@[^\s/?#"'@]*)*@`), "${1}" + hidden + "@"},
	// Authorization: Basic …, as printed by HTTP, by Go's %v and in JSON; Docker's X-Registry-Auth;
	// cookies
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
	// …?X-Amz-Signature=…&sig=…: presigned URLs in registries' redirects
	{regexp.MustCompile(`(?i)([?&][^=&\s"']*(?:token|sig|secret|password|credential|key|auth)[^=&\s"']*=)[^&\s"'#]+`),
		"${1}" + hidden},
	// JSON Web Tokens (RFC 7519)
	{regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`), hidden},
}

// Mask returns a text without credentials: anything in the form of one, and the known secrets. It
// recognises known secrets in plain form and as encoded by JSON, Go, URLs, HTML and base64, also
// nested and split over lines. It truncates texts longer than maxText bytes.
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
		text = f.shape.ReplaceAllString(text, f.replacement)
	}
	return text
}

// Hide returns an error with a masked text. The error keeps its kind.
func Hide(err error, known ...string) error {
	if err == nil {
		return nil
	}

	text := Mask(err.Error(), known...)
	if text == err.Error() {
		return err
	}

	return maskedError{text, err}
}

type maskedError struct {
	text string
	err  error
}

// Error implements error.
func (d maskedError) Error() string { return d.text }

// Unwrap is for errors.Is and errors.As.
func (d maskedError) Unwrap() error { return d.err }

// Attr masks texts and errors. It is a slog.HandlerOptions.ReplaceAttr function.
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
