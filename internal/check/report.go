package check

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/text"
)

// Formats of --output.
const (
	formatText = "text"
	formatJSON = "json"
)

// report prints findings.
type report struct {
	out    io.Writer
	format string
}

// document is the JSON form. It is stable: releases add fields and never rename one.
type document struct {
	Status   finding.Status    `json:"status"`
	Findings []finding.Finding `json:"findings"`
}

// print prints the findings. It returns an error if any of them failed.
func (r report) print(all []finding.Finding) error {
	var err error
	if r.format == formatJSON {
		e := json.NewEncoder(r.out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		err = e.Encode(document{finding.Worst(all), all})
	} else {
		_, err = io.WriteString(r.out, render(all, isColorTerminal(r.out)))
	}

	if err == nil && finding.Worst(all) == finding.Fail {
		err = fmt.Errorf("%w: %s", errFailed, summary(all))
	}

	return err
}

// podRequirements returns the findings required for pods to run.
func podRequirements() []string {
	return []string{"engine", "engine-version", "daemon", "runtime-ready", "network-ready", "cni-config", "cni-plugins"}
}

// printWithPod prints the findings, then runs the self-test. It skips the self-test if a finding
// shows that pods cannot run.
func (r report) printWithPod(all []finding.Finding, run func(io.Writer) error) error {
	cannotRun := slices.ContainsFunc(all, func(f finding.Finding) bool {
		return f.Status == finding.Fail && slices.Contains(podRequirements(), f.ID)
	})

	if r.format == formatJSON {
		pod := finding.Finding{
			ID:     "pod",
			Title:  "self-test pod",
			Status: finding.Skipped,
			Detail: "skipped because of the failed findings",
		}
		if !cannotRun {
			pod = podFinding(run(io.Discard))
		}

		return r.print(append(all, pod))
	}

	err := r.print(all)
	if cannotRun {
		return err
	}
	if _, werr := fmt.Fprintln(r.out); werr != nil {
		return werr
	}

	return errors.Join(err, run(r.out))
}

// podFinding converts the result of the self-test to a finding.
func podFinding(err error) finding.Finding {
	f := finding.Finding{ID: "pod", Title: "self-test pod", Status: finding.OK, Detail: "all steps passed"}
	if err != nil {
		f.Status, f.Detail, f.Fix = finding.Fail, text.Clean(err.Error(), text.MaxMessage), restart()
	}

	if failed := (*stepError)(nil); errors.As(err, &failed) {
		f.Detail = fmt.Sprintf("%s: %s; likely cause: %s", failed.step.name,
			text.Clean(failed.err.Error(), text.MaxMessage), failed.step.cause)
		f.Fix = failed.step.fix
	}

	return f
}

// summary counts failures and warnings.
func summary(all []finding.Finding) string {
	count := map[finding.Status]int{}
	for _, f := range all {
		count[f.Status]++
	}

	var parts []string
	switch n := count[finding.Fail]; n {
	case 0:
		parts = append(parts, "no failures")
	case 1:
		parts = append(parts, "1 failure")
	default:
		parts = append(parts, fmt.Sprintf("%d failures", n))
	}

	if n := count[finding.Warn]; n == 1 {
		parts = append(parts, "1 warning")
	} else if n > 1 {
		parts = append(parts, fmt.Sprintf("%d warnings", n))
	}

	return strings.Join(parts, ", ")
}

// render returns one line for each finding, followed by its fix.
func render(all []finding.Finding, color bool) string {
	var b strings.Builder
	for _, f := range all {
		word := string(f.Status)
		if f.Status == finding.Fail {
			word = "FAIL"
		}

		if color {
			word = map[finding.Status]string{
				finding.OK:      "\x1b[32m",
				finding.Warn:    "\x1b[33m",
				finding.Fail:    "\x1b[1;31m",
				finding.Skipped: "\x1b[2m",
			}[f.Status] + fmt.Sprintf("%-4s", word) + "\x1b[0m"
		}

		detail := f.Detail
		if f.Cause != "" {
			detail = "caused by " + f.Cause
		}

		fmt.Fprintf(&b, "%-4s  %-17s %s\n", word, f.ID, strings.ReplaceAll(detail, "\n", "; "))
		if !f.Fix.IsZero() {
			fmt.Fprintf(&b, "      %-17s %s\n", "  fix:", f.Fix)
		}
	}

	fmt.Fprintf(&b, "check: %s\n", summary(all))

	return b.String()
}

// isColorTerminal reports whether out is a terminal with colors enabled (https://no-color.org).
func isColorTerminal(out io.Writer) bool {
	f, isFile := out.(*os.File)
	if !isFile || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
