// Package finding decides what stops a node: from facts, which package probe gathers, to findings
// with the command that fixes each. It is pure: no I/O, no clock, so that every finding is tested
// on facts made up. docs/check.md has every finding's meaning. Facts may hold what other users
// wrote: details pass through text.Clean, and fixes are built by package shell, which quotes every
// word.
package finding

import (
	"fmt"
	"slices"

	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/text"
)

// Status of a finding.
type Status string

// The statuses. Only Fail stops a node.
const (
	OK      Status = "ok"
	Warn    Status = "warn"
	Fail    Status = "fail"
	Skipped Status = "skip" // cannot be judged or does not matter here
)

// Finding is one line of the report. The JSON form is stable: fields are added, never renamed.
type Finding struct {
	ID      string     `json:"id"`
	Title   string     `json:"title"`
	Status  Status     `json:"status"`
	Detail  string     `json:"detail"`            // printable, at most text.MaxMessage bytes
	Fix     shell.Line `json:"fix,omitzero"`      // a command line, or a file and what to set in it
	Because string     `json:"because,omitempty"` // the ID of the failed finding that explains this one
}

// verdict is what a rule says.
type verdict struct {
	status Status
	detail string
	fix    shell.Line
}

func ok(format string, args ...any) verdict {
	return verdict{status: OK, detail: describe(format, args)}
}

func skip(format string, args ...any) verdict {
	return verdict{status: Skipped, detail: describe(format, args)}
}

func warn(fix shell.Line, format string, args ...any) verdict {
	return verdict{status: Warn, detail: describe(format, args), fix: fix}
}

func fail(fix shell.Line, format string, args ...any) verdict {
	return verdict{status: Fail, detail: describe(format, args), fix: fix}
}

// describe formats a detail. Facts in it may be another user's text: each is bounded, so that none
// displaces the others, and the whole is printable.
func describe(format string, args []any) string {
	for i, a := range args {
		if s, isString := a.(string); isString {
			args[i] = text.Clean(s, text.MaxName)
		}
	}
	return text.Clean(fmt.Sprintf(format, args...), text.MaxMessage)
}

// rule is one finding: causes come before what they explain.
type rule struct {
	id, title string
	causes    []string // of which any that has failed explains why this one cannot be ok
	judge     func(*Facts) verdict
}

// rules are all findings, causes first. A new one gets its section in docs/check.md.
func rules() []rule {
	return slices.Concat(nodeRules(), engineRules(), daemonRules(), networkRules(), kubeletRules())
}

// Judge is every finding on these facts: what fails first, causes before consequences, then
// warnings, then the rest.
func Judge(f *Facts) []Finding {
	because := map[string]string{} // finding that has failed or is explained: the root cause
	var all []Finding
	for _, r := range rules() {
		v := r.judge(f)
		out := Finding{ID: r.id, Title: r.title, Status: v.status, Detail: v.detail, Fix: v.fix}
		if v.status != OK {
			for _, c := range r.causes {
				if root := because[c]; root != "" {
					out.Status, out.Fix, out.Because = Skipped, shell.Line{}, root
					break
				}
			}
		}

		switch {
		case out.Because != "":
			because[r.id] = out.Because
		case out.Status == Fail:
			because[r.id] = r.id
		}

		all = append(all, out)
	}

	rank := map[Status]int{Fail: 0, Warn: 1, OK: 2, Skipped: 3}
	slices.SortStableFunc(all, func(a, b Finding) int { return rank[a.Status] - rank[b.Status] })

	return all
}

// Worst is the status of the node: Fail, Warn or OK.
func Worst(all []Finding) Status {
	worst := OK
	for _, f := range all {
		if f.Status == Fail || f.Status == Warn && worst == OK {
			worst = f.Status
		}
	}
	return worst
}
