// Package finding decides what stops a node: from facts, which package probe gathers, to findings with the one line that mends each. It is
// pure: no I/O, no clock, so that every finding is tested on facts made up. docs/check.md has every finding's meaning.
package finding

import (
	"fmt"
	"slices"
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
	ID      string `json:"id"`
	Title   string `json:"title"`
	Status  Status `json:"status"`
	Detail  string `json:"detail"`
	Mend    string `json:"mend,omitempty"`    // a command line, or a file and what to set in it
	Because string `json:"because,omitempty"` // the ID of the failed finding that explains this one
}

// verdict is what a rule says.
type verdict struct {
	status Status
	detail string
	mend   string
}

func ok(format string, args ...any) verdict { return verdict{OK, fmt.Sprintf(format, args...), ""} }
func skip(format string, args ...any) verdict {
	return verdict{Skipped, fmt.Sprintf(format, args...), ""}
}
func warn(mend, format string, args ...any) verdict {
	return verdict{Warn, fmt.Sprintf(format, args...), mend}
}
func fail(mend, format string, args ...any) verdict {
	return verdict{Fail, fmt.Sprintf(format, args...), mend}
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

// Judge is every finding on these facts: what fails first, causes before consequences, then warnings, then the rest.
func Judge(f *Facts) []Finding {
	because := map[string]string{} // finding that has failed or is explained: the root cause
	var all []Finding
	for _, r := range rules() {
		v := r.judge(f)
		out := Finding{ID: r.id, Title: r.title, Status: v.status, Detail: v.detail, Mend: v.mend}
		if v.status != OK {
			for _, c := range r.causes {
				if root := because[c]; root != "" {
					out.Status, out.Mend, out.Because = Skipped, "", root
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
