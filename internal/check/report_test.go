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

// sample returns a finding of each status.
func sample() []finding.Finding {
	return []finding.Finding{
		{
			ID:     "engine",
			Title:  "Docker responds",
			Status: finding.Fail,
			Detail: "connection\nrefused",
			Fix:    shell.Command("systemctl start docker"),
		},
		{
			ID:     "clock",
			Title:  "clock",
			Status: finding.Warn,
			Detail: "not <set> & not synchronized",
			Fix:    shell.Command("timedatectl set-ntp true"),
		},
		{ID: "swap", Title: "swap", Status: finding.OK, Detail: "swap is disabled"},
		{ID: "engine-log-driver", Title: "log driver", Status: finding.Skipped, Detail: "unknown", Cause: "engine"},
	}
}

// golden compares got with a file in testdata. UPDATE_GOLDEN=1 rewrites the file.
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
	golden(t, "color.txt", strings.ReplaceAll(render(sample(), true), "\x1b", "ESC"))
	for _, format := range []string{formatText, formatJSON} {
		t.Run(format, func(t *testing.T) {
			var out bytes.Buffer
			if err := (report{&out, format}).print(sample()); !errors.Is(err, errFailed) {
				t.Errorf("got error %v, want %v", err, errFailed)
			}
			golden(t, "report."+format, out.String())
		})
	}

	if err := (report{io.Discard, formatText}).print(sample()[1:]); err != nil {
		t.Errorf("got error %v for warnings only", err)
	}
}

// TestReportWithPod checks that the self-test runs unless a finding shows that pods cannot run.
func TestReportWithPod(t *testing.T) {
	for _, format := range []string{formatText, formatJSON} {
		t.Run(format, func(t *testing.T) { testReportWithPod(t, format) })
	}

	if f := podFinding(errors.New("no image")); f.Status != finding.Fail || f.Fix.IsZero() {
		t.Errorf("got %+v, want a failure with a fix", f)
	}
}

func testReportWithPod(t *testing.T, format string) {
	runs := 0
	test := func(err error) func(io.Writer) error {
		return func(out io.Writer) error { runs++; fmt.Fprintln(out, "POD"); return err }
	}

	var out bytes.Buffer
	r := report{&out, format}
	if err := r.printWithPod(sample(), test(nil)); runs != 0 || !errors.Is(err, errFailed) {
		t.Errorf("without an engine: self-test ran %d times, error %v", runs, err)
	}

	out.Reset()
	if err := r.printWithPod(sample()[1:], test(nil)); runs != 1 || err != nil {
		t.Errorf("with an engine: self-test ran %d times, error %v", runs, err)
	}

	if printed := strings.Contains(out.String(), "POD"); printed != (format == formatText) {
		t.Errorf("output of the self-test: %s", &out)
	}

	out.Reset()
	failure := &stepError{step{
		name:  "exec",
		cause: "cable",
		fix:   shell.Advice("plug it in"),
	}, errors.New("no carrier")}
	if err := r.printWithPod(sample()[1:], test(failure)); !errors.Is(err, errFailed) {
		t.Errorf("failed self-test: got error %v, want %v", err, errFailed)
	}

	if format == formatJSON && !strings.Contains(out.String(), "exec: no carrier; likely cause: cable") {
		t.Errorf("failed self-test: %s", &out)
	}
}

func TestNoColorInFiles(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if isColorTerminal(f) || isColorTerminal(&bytes.Buffer{}) {
		t.Error("isColorTerminal: got true for a file or a buffer")
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"--output=xml"}, {"--pod-cidr=x"}} {
		cfg := &config.Config{}
		cmd := NewCommand(cfg)
		cfg.Register(cmd.Flags())
		cmd.SetArgs(args)
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); exit.CodeOf(err) != exit.Usage {
			t.Errorf("%v: got error %v, want a usage error", args, err)
		}
	}
}
