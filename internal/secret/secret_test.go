package secret

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestMask(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{
			`Get "https://user:s3cret@registry.test/v2/": EOF`,
			`Get "https://***@registry.test/v2/": EOF`,
		},
		{
			`Get "https://user:p@ss@registry.test/v2/": EOF`,
			`Get "https://***@registry.test/v2/": EOF`,
		},
		{
			`https://registry.test/v2/a@sha256:abc: not found`,
			`https://registry.test/v2/a@sha256:abc: not found`,
		},
		{
			`sent Authorization: Basic dXNlcjpwYXNz and failed`,
			`sent Authorization: *** and failed`,
		},
		{
			`map[Authorization:[Bearer abc.def] User-Agent:[x]]`,
			`map[Authorization:[***] User-Agent:[x]]`,
		},
		{`{"Authorization":"Bearer abc","x":1}`, `{"Authorization":"***","x":1}`},
		{`{\"Authorization\":\"Basic abc\"}`, `{\"Authorization\":\"***\"}`},
		{`X-Registry-Auth: eyJ1c2VybmFtZSI6ImEifQ==`, `X-Registry-Auth: ***`},
		{`refused bearer 0123456789abcdef0123`, `refused bearer ***`},
		{`no basic auth credentials`, `no basic auth credentials`},
		{
			`Bearer realm="https://auth.test/token",service="x"`,
			`Bearer realm="https://auth.test/token",service="x"`,
		},
		{
			`{"username":"u","password":"p w","identitytoken":"t"}`,
			`{"username":"u","password":"***","identitytoken":"***"}`,
		},
		{
			`unauthorized: incorrect username or password`,
			`unauthorized: incorrect username or password`,
		},
		{`grant failed: refresh_token=abc&scope=x`, `grant failed: refresh_token=***&scope=x`},
		{
			`Get "https://s3.test/blob?X-Amz-Signature=abc&X-Amz-Date=1": 403`,
			`Get "https://s3.test/blob?X-Amz-Signature=***&X-Amz-Date=1": 403`,
		},
		{
			`Get "https://auth.test/token?scope=repository%3Aa%3Apull&service=s": 401`,
			`Get "https://auth.test/token?scope=repository%3Aa%3Apull&service=s": 401`,
		},
		{`got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig from it`, `got *** from it`},
		{`auth.auth is not base64`, `auth.auth is not base64`},
		{
			`manifest for registry.test/team/app:1 not found: manifest unknown: x != y`,
			`manifest for registry.test/team/app:1 not found: manifest unknown: x != y`,
		},
	} {
		t.Run(c.text, func(t *testing.T) {
			if got := Mask(c.text); got != c.want {
				t.Errorf("masked as %s\nwant      %s", got, c.want)
			}
		})
	}
}

func TestMaskOfKnownSecrets(t *testing.T) {
	got := Mask("user bob with hunter2 and hunter2hunter2, a", "hunter2", "hunter2hunter2", "a", "")
	if want := "user bob with *** and ***, a"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestLogsAreMasked(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{ReplaceAttr: Attr}))
	err := errors.New("Authorization: Bearer s3cret")
	log.Error("https://user:s3cret@registry.test", "err", err, "text", "https://user:s3cret@registry.test", "n", 1,
		"nothing", error(nil), slog.Group("g", "err", err))
	if strings.Contains(out.String(), "s3cret") || !strings.Contains(out.String(), "registry.test") ||
		!strings.Contains(out.String(), `"n":1`) {
		t.Errorf("log is not masked: %s", out.String())
	}
}

func TestHiddenErrorsKeepTheirKind(t *testing.T) {
	kind := errors.New("denied")
	err := fmt.Errorf("bob with hunter2: %w", kind)
	got := Hide(err, "hunter2")
	if got.Error() != "bob with ***: denied" || !errors.Is(got, kind) {
		t.Errorf("masked error is %v", got)
	}
	if got := Hide(kind, "hunter2"); got != kind { //nolint:errorlint // the same one
		t.Errorf("error without secrets was changed to %v", got)
	}
	if Hide(nil) != nil {
		t.Error("Hide(nil) returned an error")
	}
}
