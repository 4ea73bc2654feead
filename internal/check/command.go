// Package check implements `cri-dockerd check`, which diagnoses a node. Package probe gathers
// facts, package finding evaluates them, and this package prints the report. The self-test (--pod)
// runs one pod through the daemon's socket. Its image contains this program, so it requires no
// registry.
package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/check/probe"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/exit"
	"cri-dockerd/internal/text"
)

const (
	pageCommand = "check-page-server"
	pagePort    = "8080"
	page        = "It works: this page comes from a pod that cri-dockerd runs on Docker.\n"
)

// NewCommand returns the subcommand check. cfg holds the flags shared with the daemon.
func NewCommand(cfg *config.Config) *cobra.Command {
	var pod bool
	var format string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Diagnose problems of this node",
		Long: `check diagnoses this node: Docker Engine, the daemon, the pod network, the kubelet and the host.
It prints each problem with a command to fix it, root causes first (docs/check.md), and makes no changes to the
node. Flags default to those of the running daemon or of its systemd unit.

With --pod, check also runs a test pod through the daemon's socket: sandbox, container, HTTP request, exec,
logs, port-forward, removal. The test pod requires no image registry.

Exit code: 0 without failures (there may be warnings), 1 with failures, 2 for a mistake on the command line.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != formatText && format != formatJSON {
				formats := []string{formatText, formatJSON}
				return exit.UsageError(fmt.Errorf("--output %q: use one of %q", format, formats))
			}

			p := probe.New(timeout)
			found := p.Adopt(cmd.Context(), cfg, cmd.Flags())
			cfg.Complete(cmd.Flags())
			if err := cfg.Validate(); err != nil && found.Given {
				// the error may quote text of another user
				return exit.UsageError(errors.New(text.Clean(err.Error(), text.MaxMessage)))
			} else if err != nil {
				found.Mistake.Error = err.Error()
			}

			findings := finding.Evaluate(p.Gather(cmd.Context(), cfg, found))
			r := report{out: cmd.OutOrStdout(), format: format}
			if !pod {
				return r.print(findings)
			}

			return r.printWithPod(findings, func(out io.Writer) error {
				return runPod(cmd.Context(), found.Endpoint, probe.EngineConfig(cfg), out)
			})
		},
	}

	cmd.Flags().BoolVar(&pod, "pod", false, "also run a test pod through the daemon, then remove it")
	cmd.Flags().DurationVar(&timeout, "timeout", probe.Timeout,
		"time after which a response of a service is slow")
	cmd.Flags().StringVarP(&format, "output", "o", formatText, "output format: text or json")

	return cmd
}

// NewPageServerCommand returns the subcommand for the container of the test pod. It serves one page
// and logs a line for each request.
func NewPageServerCommand() *cobra.Command {
	return &cobra.Command{
		Use:    pageCommand,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			server := http.Server{
				Addr:              ":" + pagePort,
				ReadHeaderTimeout: 10 * time.Second,
				Handler:           pageHandler(cmd.OutOrStdout()),
			}

			stop := context.AfterFunc(cmd.Context(), func() { server.Close() })
			defer stop()

			if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve the page: %w", err)
			}

			return nil
		},
	}
}

// pageHandler serves the page and logs each request to out.
func pageHandler(out io.Writer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(out, "%s %s\n", r.Method, r.URL.Path)
		_, _ = io.WriteString(w, page)
	}
}
