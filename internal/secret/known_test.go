package secret

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

// writers embed a secret in a text as other programs do.
var writers = map[string]func(string) string{
	"plain":       func(s string) string { return "denied for " + s + " there" },
	"JSON":        func(s string) string { b, _ := json.Marshal(map[string]string{"detail": s}); return string(b) },
	"JSON, plain": func(s string) string { return `{"detail":"` + plainJSON(s) + `"}` },
	"JSON, slash": func(s string) string { return `{"detail":"` + strings.ReplaceAll(plainJSON(s), "/", `\/`) + `"}` },
	"quoted":      func(s string) string { return fmt.Sprintf("refused %q and %+q", s, s) },
	"query":       func(s string) string { return "https://registry.test/?service=x&scope=" + url.QueryEscape(s) },
	"path":        func(s string) string { return "https://registry.test/" + url.PathEscape(s) + "/x" },
	"lower":       func(s string) string { return "/" + lowerEscapes(url.PathEscape(s)) },
	"HTML":        func(s string) string { return "<p>" + html.EscapeString(s) + "</p>" },
	"base64":      func(s string) string { return "sent " + base64.StdEncoding.EncodeToString([]byte(s)) },
	"basic": func(s string) string {
		return "sent " + base64.StdEncoding.EncodeToString([]byte("bob:"+s)) + " away"
	},
	"header": func(s string) string {
		b, _ := json.Marshal(map[string]string{"username": "bob", "x": s, "serveraddress": "registry.test"})
		return "map[X-Auth:[" + base64.URLEncoding.EncodeToString(b) + "]]"
	},
	"header, raw": func(s string) string {
		b, _ := json.Marshal(map[string]string{"username": "bob", "x": s})
		return "v2/" + base64.RawURLEncoding.EncodeToString(b)
	},
	"base64 in JSON in base64": func(s string) string {
		b, _ := json.Marshal(map[string]string{"data": base64.StdEncoding.EncodeToString([]byte("bob:" + s))})
		return base64.StdEncoding.EncodeToString(b)
	},
	"wrapped base64": func(s string) string {
		b := base64.StdEncoding.EncodeToString([]byte("bob:" + s + ":and a text that is longer than one line"))
		var lines []string
		for len(b) > 19 {
			lines, b = append(lines, b[:19]), b[19:]
		}
		return strings.Join(append(lines, b), "\r\n\t")
	},
	"split": func(s string) string { return "sent " + s[:1] + "\n    " + s[1:] },
}

// TestKnownSecretsInEveryEncoding masks random credentials of any characters, in each encoding and
// in two nested ones. The result must contain nothing that decodes to the secret.
func TestKnownSecretsInEveryEncoding(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	alphabets := []string{"abcXYZ019", `"\/'<>&%+=?#@:; ` + "`~$", "äß漢字🔑é", "a\\\"\n%2F\t"}
	for range 40 {
		letters := []rune(alphabets[random.IntN(len(alphabets))] + "abcdefghijklmnopqrstuvwxyz0123456789")
		secret := "se" // no white space at the ends and at the split, because joining lines drops it
		for range 7 + random.IntN(30) {
			secret += string(letters[random.IntN(len(letters))])
		}

		secret += "e"
		for name, write := range writers {
			check(t, name, secret, write(secret))
			if name != "split" && name != "wrapped base64" {
				check(t, name+" in JSON", secret, encodeJSON(write(secret)))
				check(t, name+" quoted", secret, strconv.Quote(write(secret)))
			}
		}
	}
}

func check(t *testing.T, name, secret, text string) {
	t.Helper()
	masked := Mask(text, "other-secret", secret)
	for _, form := range []string{
		secret, encodeJSON(secret), plainJSON(secret), strconv.Quote(secret), url.QueryEscape(secret),
		url.PathEscape(secret), html.EscapeString(secret),
		strings.Trim(base64.StdEncoding.EncodeToString([]byte(secret)), "="),
	} {
		if strings.Contains(joinLines(masked), joinLines(form)) {
			t.Errorf("%s: %q remains of secret %q\nin text %q\nmasked %q", name, form, secret, text, masked)
			return
		}
	}

	if !strings.Contains(masked, hidden) {
		t.Errorf("%s: %q is not masked: %q", name, text, masked)
	}

	for _, run := range base64Run.FindAllString(masked, -1) {
		run = strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(run)
		plain, err := base64.RawURLEncoding.DecodeString(run)
		if err == nil && strings.Contains(string(plain), secret) {
			t.Errorf("%s: base64 of %q remains: %q", name, secret, masked)
		}
	}
}

// TestLongTexts expects a text of any length to be masked quickly, and a cut to reveal no part of a
// secret.
func TestLongTexts(t *testing.T) {
	const secret = "p@ss word/with\\all"

	for shift := 0; shift < 2*len(secret); shift += 3 {
		for _, write := range []func(string) string{plainJSON, url.QueryEscape, func(s string) string {
			return base64.StdEncoding.EncodeToString([]byte("bob:" + s))
		}} {
			masked := Mask(strings.Repeat("x ", maxText/2-len(secret))+strings.Repeat("-", shift)+write(secret)+
				strings.Repeat("y ", 1<<20), secret)
			if len(masked) > maxText+8 || strings.Contains(masked, "p@ss") || strings.Contains(masked, "p%40s") ||
				strings.Contains(masked, "Ym9iOnBAc3M") {
				t.Fatalf("shift %d: %d bytes, %q", shift, len(masked), masked[len(masked)-60:])
			}
		}
	}
}

// TestOrdinaryTextStays expects texts without a secret to be unchanged.
func TestOrdinaryTextStays(t *testing.T) {
	known := []string{"hunter-two", "p%4", "abc"}

	for _, text := range []string{
		"pull registry.test/team/app:1: manifest unknown",
		"sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 not found",
		"container 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef exited",
		"line one\n\tline two\r\nline three",
		`{"message":"no space left on device","code":"UNKNOWN"}`,
		"/var/lib/docker/overlay2/abcdefghijklmnop/merged: directory not empty",
		"100 % of a + b <c> & \"d\" \\ e",
	} {
		t.Run(text, func(t *testing.T) {
			if got := Mask(text, known...); got != text {
				t.Errorf("masked as %q", got)
			}
		})
	}
}

// TestFieldsOfUnknownSecrets expects a quote within a value not to end it.
func TestFieldsOfUnknownSecrets(t *testing.T) {
	for text, want := range map[string]string{
		`{"password":"ab\"cd\\","x":1}`:                 `{"password":"***","x":1}`,
		`{\"password\":\"ab\\\"cd\\\\\",\"x\":1}`:       `{\"password\":\"***\",\"x\":1}`,
		`{"identitytoken":"a\u003d\/b","username":"u"}`: `{"identitytoken":"***","username":"u"}`,
	} {
		t.Run(text, func(t *testing.T) {
			if got := Mask(text); got != want {
				t.Errorf("masked as %s, want %s", got, want)
			}
		})
	}
}
