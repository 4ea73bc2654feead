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

func TestRunStopsAtFirstFailure(t *testing.T) {
	succeed := func(detail string) func(context.Context) (string, error) {
		return func(context.Context) (string, error) { return detail, nil }
	}
	var out bytes.Buffer
	err := run(t.Context(), &out, []step{
		{"first", "", shell.Line{}, succeed("")},
		{"second", "cable", shell.Advice("plug it in"), func(context.Context) (string, error) {
			return "ignored", errors.New("no carrier")
		}},
		{"third", "", shell.Line{}, succeed("unreachable")},
	})
	if !errors.Is(err, errFailed) || !strings.Contains(err.Error(), "second") {
		t.Errorf("run: %v", err)
	}

	got := regexp.MustCompile(` +\d+m?s  `).ReplaceAllString(out.String(), " ")
	want := "ok first\nFAIL second\n     no carrier\n     likely cause: cable\n     fix: plug it in\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	out.Reset()
	if err := run(t.Context(), &out, []step{{"only", "", shell.Line{}, succeed("this")}}); err != nil ||
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
		start := time.Now()
		if err := eventually(t.Context(), time.Second, func(context.Context) error {
			return never
		}); !errors.Is(err, never) || time.Since(start) != time.Second {
			t.Errorf("eventually: %v after %s", err, time.Since(start))
		}
	})
}

func TestStepsHaveCauseAndFix(t *testing.T) {
	for _, s := range (&podTest{}).steps() {
		if s.name == "" || s.cause == "" || s.fix.IsZero() || s.do == nil {
			t.Errorf("step %q has no cause or no fix", s.name)
		}
	}
}

func TestReadStatic(t *testing.T) {
	if _, err := readStatic("../engine/pause/bin/pause-amd64"); err != nil {
		t.Error(err)
	}

	if _, err := readStatic("/bin/sh"); err == nil || !strings.Contains(err.Error(), "not static") {
		t.Errorf("dynamically linked program: got error %v", err)
	}

	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}

	if _, err := readStatic(script); err == nil {
		t.Error("script: got no error")
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
