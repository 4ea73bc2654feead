package check

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/exit"
	"cri-dockerd/internal/shell"
)

// sample has a finding of every status.
func sample() []finding.Finding {
	return []finding.Finding{
		{
			ID:     "engine",
			Title:  "Docker answers",
			Status: finding.Fail,
			Detail: "nobody\nlistens",
			Fix:    shell.Command("systemctl start docker"),
		},
		{
			ID:     "clock",
			Title:  "clock",
			Status: finding.Warn,
			Detail: "not <right> & not kept",
			Fix:    shell.Command("timedatectl set-ntp true"),
		},
		{ID: "swap", Title: "swap", Status: finding.OK, Detail: "there is none"},
		{ID: "engine-log-driver", Title: "log driver", Status: finding.Skipped, Detail: "not known", Because: "engine"},
	}
}

// golden compares with a file of testdata; with UPDATE_GOLDEN=1 it writes it anew.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := "testdata/" + name
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: %s", file, diff)
	}
}

func TestReport(t *testing.T) {
	golden(t, "colour.txt", strings.ReplaceAll(render(sample(), true), "\x1b", "ESC"))
	for _, format := range []string{formatText, formatJSON} {
		var out bytes.Buffer
		if err := (report{&out, format}).end(sample()); !errors.Is(err, errFailed) {
			t.Errorf("%s: %v", format, err)
		}
		golden(t, "report."+format, out.String())
	}

	if err := (report{io.Discard, formatText}).end(sample()[1:]); err != nil {
		t.Errorf("warnings fail: %v", err)
	}
}

// TestReportWithPod runs the self-test only where no finding says already that it cannot work.
func TestReportWithPod(t *testing.T) {
	for _, format := range []string{formatText, formatJSON} {
		ran := 0
		test := func(err error) func(io.Writer) error {
			return func(out io.Writer) error { ran++; fmt.Fprintln(out, "POD"); return err }
		}
		var out bytes.Buffer
		r := report{&out, format}
		if err := r.withPod(sample(), test(nil)); ran != 0 || !errors.Is(err, errFailed) {
			t.Errorf("%s: ran %d times without an engine: %v", format, ran, err)
		}

		out.Reset()
		if err := r.withPod(sample()[1:], test(nil)); ran != 1 || err != nil {
			t.Errorf("%s: ran %d times: %v", format, ran, err)
		}

		if is := strings.Contains(out.String(), "POD"); is != (format == formatText) {
			t.Errorf("%s: %s", format, &out)
		}

		out.Reset()
		failure := &stepError{step{
			name:  "exec",
			cause: "the cable",
			fix:   shell.Advice("plug it in"),
		}, errors.New("no light")}
		if err := r.withPod(sample()[1:], test(failure)); !errors.Is(err, errFailed) {
			t.Errorf("%s: %v", format, err)
		}

		if format == formatJSON && !strings.Contains(out.String(), "exec: no light; likely cause: the cable") {
			t.Errorf("%s", &out)
		}
	}

	if f := podFinding(errors.New("no image")); f.Status != finding.Fail || f.Fix.IsZero() {
		t.Errorf("%+v", f)
	}
}

func TestNoColourInFiles(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if coloured(f) || coloured(&bytes.Buffer{}) {
		t.Error("a file is given colours")
	}
}

func TestMistakes(t *testing.T) {
	for _, args := range [][]string{{"--output=xml"}, {"--pod-cidr=x"}} {
		cfg := &config.Config{}
		cmd := NewCommand(cfg)
		cfg.Register(cmd.Flags())
		cmd.SetArgs(args)
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); exit.CodeOf(err) != exit.Usage {
			t.Errorf("%v: %v", args, err)
		}
	}
}
