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

// report is how findings are shown.
type report struct {
	out    io.Writer
	format string
}

// document is the JSON form. It is stable: fields are added, never renamed.
type document struct {
	Status   finding.Status    `json:"status"`
	Findings []finding.Finding `json:"findings"`
}

// end shows the findings; the error says that something stops the node.
func (r report) end(all []finding.Finding) error {
	var err error
	if r.format == formatJSON {
		e := json.NewEncoder(r.out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		err = e.Encode(document{finding.Worst(all), all})
	} else {
		_, err = io.WriteString(r.out, render(all, coloured(r.out)))
	}

	if err == nil && finding.Worst(all) == finding.Fail {
		err = fmt.Errorf("%w: %s", errFailed, summary(all))
	}

	return err
}

// podNeeds are the findings without which no pod can run.
func podNeeds() []string {
	return []string{"engine", "engine-version", "daemon", "runtime-ready", "network-ready", "cni-config", "cni-plugins"}
}

// withPod shows the findings and then what the self-test says, unless a finding says already that
// no pod can run.
func (r report) withPod(all []finding.Finding, run func(io.Writer) error) error {
	stopped := slices.ContainsFunc(all, func(f finding.Finding) bool {
		return f.Status == finding.Fail && slices.Contains(podNeeds(), f.ID)
	})
	if r.format == formatJSON {
		pod := finding.Finding{
			ID:     "pod",
			Title:  "a pod runs",
			Status: finding.Skipped,
			Detail: "not tried: see what fails",
		}
		if !stopped {
			pod = podFinding(run(io.Discard))
		}

		return r.end(append(all, pod))
	}

	err := r.end(all)
	if stopped {
		return err
	}
	if _, werr := fmt.Fprintln(r.out); werr != nil {
		return werr
	}

	return errors.Join(err, run(r.out))
}

// podFinding is the self-test's result as a finding.
func podFinding(err error) finding.Finding {
	f := finding.Finding{ID: "pod", Title: "a pod runs", Status: finding.OK, Detail: "all steps passed"}
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

// summary counts what is not well.
func summary(all []finding.Finding) string {
	count := map[finding.Status]int{}
	for _, f := range all {
		count[f.Status]++
	}

	var parts []string
	switch n := count[finding.Fail]; n {
	case 0:
		parts = append(parts, "nothing stops this node")
	case 1:
		parts = append(parts, "1 finding stops this node")
	default:
		parts = append(parts, fmt.Sprintf("%d findings stop this node", n))
	}

	if n := count[finding.Warn]; n == 1 {
		parts = append(parts, "1 warning")
	} else if n > 1 {
		parts = append(parts, fmt.Sprintf("%d warnings", n))
	}

	return strings.Join(parts, ", ")
}

// render returns one line for each finding, with its fix below.
func render(all []finding.Finding, colour bool) string {
	var b strings.Builder
	for _, f := range all {
		word := string(f.Status)
		if f.Status == finding.Fail {
			word = "FAIL"
		}

		if colour {
			word = map[finding.Status]string{
				finding.OK:      "\x1b[32m",
				finding.Warn:    "\x1b[33m",
				finding.Fail:    "\x1b[1;31m",
				finding.Skipped: "\x1b[2m",
			}[f.Status] +
				fmt.Sprintf("%-4s", word) + "\x1b[0m"
		}

		detail := f.Detail
		if f.Because != "" {
			detail = "because of " + f.Because
		}

		fmt.Fprintf(&b, "%-4s  %-17s %s\n", word, f.ID, strings.ReplaceAll(detail, "\n", "; "))
		if !f.Fix.IsZero() {
			fmt.Fprintf(&b, "      %-17s %s\n", "  fix:", f.Fix)
		}
	}

	fmt.Fprintf(&b, "check: %s\n", summary(all))

	return b.String()
}

// coloured says whether out is a terminal that wants colours (https://no-color.org).
func coloured(out io.Writer) bool {
	f, isFile := out.(*os.File)
	if !isFile || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
