package takeover

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// text writes the report as text.
func (r *Report) text(w io.Writer) {
	older := 0
	for _, p := range r.Pods {
		if p.CreatedBy != createdHere {
			older++
		}
	}

	fmt.Fprintf(w, "Docker Engine %s, --network-plugin=%s: %s of older shims and %d of this release.\n", r.Engine,
		cmp.Or(r.NetworkPlugin, `""`), plural(older, "pod"), len(r.Pods)-older)
	fmt.Fprintln(w, "The daemon adopts them at its next start without restarting containers.")
	if len(r.Pods) > 0 {
		fmt.Fprintln(w)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "POD\tATTEMPT\tCREATED BY\tSTATE\tNETWORK\tADDRESS\tHOST PORTS\tCONTAINERS\tLOGS")
		for _, p := range r.Pods {
			state := "ready"
			if !p.Ready {
				state = "not ready"
			}
			fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, p.Attempt, p.CreatedBy, state, p.Network,
				list(p.Addresses), list(p.HostPorts), p.states(), p.logs())
		}

		t.Flush()
	}

	writeFindings(w, "Actions required before the daemon starts:", r.Findings, true)
	writeFindings(w, "Notes:", r.Findings, false)
}

// writeFindings writes the findings with or without required actions.
func writeFindings(w io.Writer, headline string, all []Finding, actionRequired bool) {
	for _, f := range all {
		if f.ActionRequired != actionRequired {
			continue
		}

		if headline != "" {
			fmt.Fprintf(w, "\n%s\n", headline)
			headline = ""
		}

		fmt.Fprintf(w, "  %s: %s\n", f.Subject, f.Detail)
		if !f.Fix.IsZero() {
			fmt.Fprintf(w, "    -> %s\n", f.Fix)
		}
	}
}

// states counts a pod's containers by state.
func (p Pod) states() string {
	var out []string
	for _, state := range []string{"running", "created", "exited", "unknown"} {
		n := 0
		for _, c := range p.Containers {
			if c.State == state {
				n++
			}
		}

		if n > 0 {
			out = append(out, fmt.Sprint(n, " ", state))
		}
	}

	return list(out)
}

// logs returns the log modes of a pod's containers.
func (p Pod) logs() string {
	var out []string
	for _, c := range p.Containers {
		if !slices.Contains(out, c.Log) {
			out = append(out, c.Log)
		}
	}
	return cmp.Or(strings.Join(out, "; "), "-")
}

// text writes the hand-back plan as text.
func (h *HandBack) text(w io.Writer, dryRun bool) {
	verb := "Wrote"
	if dryRun {
		verb = "Would write"
	}

	fmt.Fprintf(w, "%s checkpoints for an older shim: %s. Pods with an existing checkpoint: %d.\n", verb,
		plural(len(h.Written), "pod"), h.Existing)
	for _, n := range h.Written {
		fmt.Fprintf(w, "  %s, host ports %s\n", n.Pod, list(n.HostPorts))
	}

	if len(h.Drain) > 0 {
		fmt.Fprintf(w, "\nDrain before the older shim starts: %s. Otherwise it recreates them without releasing their "+
			"addresses.\n", plural(len(h.Drain), "pod"))
		for _, d := range h.Drain {
			fmt.Fprintf(w, "  %s: %s\n", d.Pod, d.Reason)
		}
	}
}

func list(items []string) string { return cmp.Or(strings.Join(items, ","), "-") }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprint(n, " ", what, "s")
}
