// Package finding diagnoses a node. It turns facts, gathered by package probe, into findings with a
// command to fix each. The package is pure: it has no I/O and no clock, so tests run every finding
// on constructed facts. docs/check.md documents the findings. Facts may contain text from other
// users: details pass through text.Clean, and package shell quotes every word of a fix.
package finding

import (
	"fmt"
	"slices"

	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/text"
)

// Status of a finding.
type Status string

// Statuses of a finding. Only Fail prevents the node from running pods.
const (
	OK      Status = "ok"
	Warn    Status = "warn"
	Fail    Status = "fail"
	Skipped Status = "skip" // not applicable, or not enough information
)

// Finding is one line of the report. Its JSON form is stable: releases add fields and never rename
// one.
type Finding struct {
	ID     string     `json:"id"`
	Title  string     `json:"title"`
	Status Status     `json:"status"`
	Detail string     `json:"detail"`          // printable, at most text.MaxMessage bytes
	Fix    shell.Line `json:"fix,omitzero"`    // a command line, or instructions
	Cause  string     `json:"cause,omitempty"` // ID of the failed finding behind this one
}

// result is the outcome of a rule.
type result struct {
	status Status
	detail string
	fix    shell.Line
}

func ok(format string, args ...any) result {
	return result{status: OK, detail: describe(format, args)}
}

func skip(format string, args ...any) result {
	return result{status: Skipped, detail: describe(format, args)}
}

func warn(fix shell.Line, format string, args ...any) result {
	return result{status: Warn, detail: describe(format, args), fix: fix}
}

func fail(fix shell.Line, format string, args ...any) result {
	return result{status: Fail, detail: describe(format, args), fix: fix}
}

// describe formats a detail. Its arguments may be another user's text: each is bounded, so that no
// argument displaces the others, and the result is printable.
func describe(format string, args []any) string {
	for i, a := range args {
		if s, isString := a.(string); isString {
			args[i] = text.Clean(s, text.MaxName)
		}
	}
	return text.Clean(fmt.Sprintf(format, args...), text.MaxMessage)
}

// rule produces one finding. A rule comes after its causes.
type rule struct {
	id, title string
	causes    []string // IDs of rules; a failure of any of them explains a failure of this one
	evaluate  func(*Facts) result
}

// rules returns all rules, causes first. Each rule has a section in docs/check.md.
func rules() []rule {
	return slices.Concat(nodeRules(), engineRules(), daemonRules(), networkRules(), kubeletRules())
}

// Evaluate returns all findings for these facts: failures first, causes before consequences, then
// warnings, then the others.
func Evaluate(f *Facts) []Finding {
	rootCause := map[string]string{} // by ID of a finding that failed or has a failed cause
	var all []Finding
	for _, r := range rules() {
		v := r.evaluate(f)
		out := Finding{ID: r.id, Title: r.title, Status: v.status, Detail: v.detail, Fix: v.fix}
		if v.status != OK {
			for _, c := range r.causes {
				if root := rootCause[c]; root != "" {
					out.Status, out.Fix, out.Cause = Skipped, shell.Line{}, root
					break
				}
			}
		}

		switch {
		case out.Cause != "":
			rootCause[r.id] = out.Cause
		case out.Status == Fail:
			rootCause[r.id] = r.id
		}

		all = append(all, out)
	}

	rank := map[Status]int{Fail: 0, Warn: 1, OK: 2, Skipped: 3}
	slices.SortStableFunc(all, func(a, b Finding) int { return rank[a.Status] - rank[b.Status] })

	return all
}

// Worst returns the status of the node: Fail, Warn or OK.
func Worst(all []Finding) Status {
	worst := OK
	for _, f := range all {
		if f.Status == Fail || f.Status == Warn && worst == OK {
			worst = f.Status
		}
	}
	return worst
}
