// Package check is `cri-dockerd check`: it tells an operator what stops a node. In this release it has the self-test (--pod), which runs one
// pod through the daemon's own socket, from an image made of this very program, so that no registry is needed.
package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"cri-dockerd/internal/config"
)

const (
	pageCommand = "check-page-server"
	pagePort    = "8080"
	page        = "It works: this page comes from a pod that cri-dockerd runs on Docker.\n"
)

// NewCommand is the subcommand check. cfg says where the daemon and Docker listen.
func NewCommand(cfg *config.Config) *cobra.Command {
	var pod bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Find what stops this node",
		Long:  "check --pod runs one pod through the daemon's socket: sandbox, container, page, exec, logs, port-forward, removal. It needs no registry.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !pod {
				return errors.New("give --pod, the self-test, which is all that check has in this release")
			}
			if err := cfg.Validate(cmd.Flags()); err != nil {
				return err
			}
			return runPod(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&pod, "pod", false, "run one pod through the daemon and remove it again")
	return cmd
}

// NewPageServerCommand is the program inside the self-test's pod: it serves one page and logs a line for each request.
func NewPageServerCommand() *cobra.Command {
	return &cobra.Command{
		Use: pageCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			server := http.Server{Addr: ":" + pagePort, ReadHeaderTimeout: 10 * time.Second, Handler: pageHandler(cmd.OutOrStdout())}
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
