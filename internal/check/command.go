// Package check is `cri-dockerd check`: it tells an operator what stops a node. Package probe
// looks, package finding judges, and this one reports. Its self-test (--pod) runs one pod through
// the daemon's own socket, from an image made of this very program, so that no registry is needed.
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

// NewCommand is the subcommand check. cfg are the daemon's flags, which are check's, too.
func NewCommand(cfg *config.Config) *cobra.Command {
	var pod bool
	var format string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Find what stops this node",
		Long: "check looks at the engine, the daemon, the pod network, the kubelet and the machine, and says what " +
			"stops this node, the cause first, each\n" +
			"finding with the command that fixes it (docs/check.md). It changes nothing. Flags that are not given " +
			"are those of the running daemon, or of\n" +
			"its unit. With --pod it then runs one pod through the daemon's socket: sandbox, container, page, exec, " +
			"logs, port-forward, removal. It needs\n" +
			"no registry.\n\nExit code: 0 if nothing stops the node (warnings may remain), 1 if something does, 2 " +
			"for a mistake on the command line.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != formatText && format != formatJSON {
				return exit.UsageError(fmt.Errorf("--output %q: use one of %q", format,
					[]string{formatText, formatJSON}))
			}

			p := probe.New(timeout)
			found := p.Adopt(cmd.Context(), cfg, cmd.Flags())
			cfg.Complete(cmd.Flags())
			if err := cfg.Validate(); err != nil && found.Given {
				// may quote another user's text
				return exit.UsageError(errors.New(text.Clean(err.Error(), text.MaxMessage)))
			} else if err != nil {
				found.Mistake.Error = err.Error()
			}

			findings := finding.Judge(p.Gather(cmd.Context(), cfg, found))
			r := report{out: cmd.OutOrStdout(), format: format}
			if !pod {
				return r.end(findings)
			}

			return r.withPod(findings, func(out io.Writer) error {
				return runPod(cmd.Context(), found.Endpoint, probe.EngineConfig(cfg), out)
			})
		},
	}

	cmd.Flags().BoolVar(&pod, "pod", false, "then run one pod through the daemon and remove it again")
	cmd.Flags().DurationVar(&timeout, "timeout", probe.Timeout, "deadline of each probe; raise it on a node that is "+
		"very busy")
	cmd.Flags().StringVarP(&format, "output", "o", formatText, "text or json")

	return cmd
}

// NewPageServerCommand is the program inside the self-test's pod: it serves one page and logs a
// line for each request.
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

// pageHandler answers with the page and writes a line for each request.
func pageHandler(out io.Writer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(out, "%s %s\n", r.Method, r.URL.Path)
		_, _ = io.WriteString(w, page)
	}
}
