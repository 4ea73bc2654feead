package check

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/shell"
)

func TestRunEndsAtTheFirstFailure(t *testing.T) {
	says := func(s string) func(context.Context) (string, error) {
		return func(context.Context) (string, error) { return s, nil }
	}
	var out bytes.Buffer
	err := run(t.Context(), &out, []step{
		{"first", "", shell.Line{}, says("")},
		{"second", "the cable", shell.Advice("plug it in"), func(context.Context) (string, error) {
			return "lost", errors.New("no light")
		}},
		{"third", "", shell.Line{}, says("never")},
	})
	if !errors.Is(err, errFailed) || !strings.Contains(err.Error(), "second") {
		t.Errorf("run: %v", err)
	}

	got := regexp.MustCompile(` +\d+m?s  `).ReplaceAllString(out.String(), " ")
	if diff := cmp.Diff("ok first\nFAIL second\n     no light\n     likely cause: the cable\n     fix: plug it in\n",
		got); diff != "" {
		t.Error(diff)
	}

	out.Reset()
	if err := run(t.Context(), &out, []step{{"only", "", shell.Line{}, says("this")}}); err != nil ||
		!strings.HasSuffix(out.String(), "  only: this\ncheck: all 1 steps passed\n") {
		t.Errorf("run: %v\n%s", err, &out)
	}
}

func TestEventually(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		if err := eventually(t.Context(), time.Second, func(context.Context) error {
			if tries++; tries < 3 {
				return errors.New("not yet")
			}
			return nil
		}); err != nil || tries != 3 {
			t.Errorf("eventually: %v after %d tries", err, tries)
		}

		never := errors.New("never")
		began := time.Now()
		if err := eventually(t.Context(), time.Second, func(context.Context) error {
			return never
		}); !errors.Is(err, never) || time.Since(began) != time.Second {
			t.Errorf("eventually: %v after %s", err, time.Since(began))
		}
	})
}

func TestEveryStepHelps(t *testing.T) {
	for _, s := range (&podTest{}).steps() {
		if s.name == "" || s.cause == "" || s.fix.IsZero() || s.do == nil {
			t.Errorf("step %q lacks a cause or a fix", s.name)
		}
	}
}

func TestStatic(t *testing.T) {
	if _, err := static("../engine/pause/bin/pause-amd64"); err != nil {
		t.Error(err)
	}

	if _, err := static("/bin/sh"); err == nil || !strings.Contains(err.Error(), "not static") {
		t.Errorf("a program that needs libraries: %v", err)
	}

	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}

	if _, err := static(script); err == nil {
		t.Error("a script passes for a program")
	}
}

func TestPage(t *testing.T) {
	var log, empty bytes.Buffer
	w := httptest.NewRecorder()
	pageHandler(&log)(w, httptest.NewRequest(http.MethodGet, "/here", &empty))
	if w.Body.String() != page || log.String() != "GET /here\n" {
		t.Errorf("page %q, log %q", w.Body, &log)
	}
}
