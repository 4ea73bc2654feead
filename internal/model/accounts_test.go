package model

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestAccounts resolves users of an image.
func TestAccounts(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\n# app:x:1:1::/:\napp:x:1000:1001:App:/:/bin/sh\n" +
		"2000:x:7:8::/:/bin/sh\nhuge:x:99999999999:1::/:\nno-group:x:5:x::/:\n"
	const group = "root:x:0:\nwheel:x:10:root,app\nstaff:x:50:other,app,app\nstaff2:x:50:app\nbad:x:-1:app\nshort:x\n"

	a := &Accounts{}
	if err := errors.Join(a.AddUsers(strings.NewReader(passwd)), a.AddGroups(strings.NewReader(group))); err != nil {
		t.Fatal(err)
	}

	for spec, want := range map[string]string{
		"":           "{0 0 [10]}",
		"root":       "{0 0 [10]}",
		"0:5":        "{0 5 [10]}",
		"app":        "{1000 1001 [10 50]}",
		"1000":       "{1000 1001 [10 50]}",
		"app:":       "{1000 1001 [10 50]}",
		"1000:wheel": "{1000 10 [10 50]}",
		"1000:4000":  "{1000 4000 [10 50]}",
		"3000":       "{3000 0 []}",
		"3000:20":    "{3000 20 []}",
		"2000":       "{7 8 []}",
		"no-group":   "not found",
		"huge":       "not found",
		"app:none":   "not found",
		"-1":         "not found",
	} {
		got, err := a.Resolve(spec)
		text := fmt.Sprint(got)
		if err != nil {
			text = "not found"
			if !errdefs.IsNotFound(err) {
				t.Errorf("%q: %v", spec, err)
			}
		}
		if text != want {
			t.Errorf("%q: %s, want %s", spec, text, want)
		}
	}

	var none Accounts
	if u, err := none.Resolve("12:13"); err != nil || fmt.Sprint(u) != "{12 13 []}" {
		t.Errorf("without files: %v, %v", u, err)
	}
}

// TestAccountsAreBounded expects an error for files that no image needs.
func TestAccountsAreBounded(t *testing.T) {
	for name, text := range map[string]string{
		"line": strings.Repeat("x", maxAccountLine+1),
		"file": strings.Repeat("name:x:1:1:::\n", MaxAccountFile/14+2),
	} {
		var a Accounts
		for of, add := range map[string]func(io.Reader) error{"users": a.AddUsers, "groups": a.AddGroups} {
			if err := add(strings.NewReader(text)); !errdefs.IsDataLoss(err) {
				t.Errorf("a large %s of %s: %v", name, of, err)
			}
		}
	}
}
