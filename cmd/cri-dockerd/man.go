package main

import (
	_ "embed"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// manPage is the manual page without its flags and commands, which come from the command line. It
// is no text/template: a program that links that package keeps every exported method, about 4 MB.
//
//go:embed cri-dockerd.8.in
var manPage string

// newManCommand returns the subcommand to print the manual page. Packages contain its output, so
// page and program always match.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man",
		Short:  "Print the manual page",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE:   func(cmd *cobra.Command, _ []string) error { return writeManual(cmd.OutOrStdout(), cmd.Root()) },
	}
}

// writeManual writes the manual page of a command in the macros of man(7).
func writeManual(w io.Writer, root *cobra.Command) error {
	page := strings.NewReplacer(
		"@VERSION@", roff(versionNumber()),
		"@COMMANDS@", manCommands(root),
		"@FLAGS@", manFlags(root.Flags()),
	).Replace(manPage)

	if _, err := io.WriteString(w, page); err != nil {
		return fmt.Errorf("manual page: %w", err)
	}
	return nil
}

// manCommands returns a list of the visible commands with their descriptions.
func manCommands(root *cobra.Command) string {
	var b strings.Builder
	for _, c := range visible(root) {
		fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", roff(c.Name()), manAbout(c))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func visible(root *cobra.Command) []*cobra.Command {
	var out []*cobra.Command
	for _, c := range root.Commands() {
		if !c.Hidden && c.Name() != "help" {
			out = append(out, c)
		}
	}
	return out
}

// roff escapes a line of text for roff. It must not begin with a control character.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

// manFlags returns a list of flags with their defaults, like --help.
func manFlags(f *pflag.FlagSet) string {
	var b strings.Builder
	f.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}

		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}

		kind, usage := pflag.UnquoteUsage(f)
		fmt.Fprintf(&b, ".TP\n.B %s", roff(name))
		if kind != "" {
			fmt.Fprintf(&b, " \\fI%s\\fR", roff(kind))
		}

		b.WriteString("\n" + roff(usage))
		if f.DefValue != "" && !strings.Contains(usage, "(default ") {
			fmt.Fprintf(&b, " (default %s)", roff(f.DefValue))
		}

		b.WriteString("\n")
	})

	return strings.TrimSuffix(b.String(), "\n")
}

// manAbout returns the description of a command and its local flags.
func manAbout(c *cobra.Command) string {
	text := c.Long
	if text == "" || c.Name() == "completion" {
		text = c.Short + "."
	}

	var b strings.Builder
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			b.WriteString(".sp\n")
			continue
		}
		b.WriteString(roff(line) + "\n")
	}

	if c.HasAvailableLocalFlags() {
		b.WriteString(".RS\n" + manFlags(c.LocalNonPersistentFlags()) + "\n.RE\n")
	}

	return strings.TrimSuffix(b.String(), "\n")
}
