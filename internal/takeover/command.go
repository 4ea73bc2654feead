// Package takeover implements `cri-dockerd takeover`. It lists the pods of older Docker shims for
// adoption by the daemon, and hands a node's pods back to such a shim. It never changes running
// pods.
package takeover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/exit"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/process"
)

const long = `takeover --dry-run lists the pods that the daemon adopts at its next start, including pods of older
shims, and reports problems. It changes nothing and can run beside an older shim and the kubelet.

takeover --hand-back prepares a node for an older shim after this daemon has been stopped. It writes the checkpoints
required by that shim to tear pods down, and lists the pods to be drained first. With --dry-run it only reports
these actions.

Pass the daemon's flags if it does not run with the defaults. See docs/migrate.md for the steps.

Exit codes: 0 no action required, 1 failed, 2 invalid command line, 3 actions required by hand.`

// options are the command's own flags.
type options struct {
	dryRun, handBack bool
	output           string
}

// NewCommand returns the subcommand takeover. cfg has the Docker endpoint and the directories.
func NewCommand(cfg *config.Config) *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "takeover",
		Short: "List the pods for adoption, or hand pods back to an older shim",
		Long:  long,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !o.dryRun && !o.handBack {
				return exit.UsageError(errors.New("takeover: use --dry-run or --hand-back; the daemon itself " +
					"adopts running pods at its start"))
			}

			if o.output != "text" && o.output != "json" {
				return exit.UsageError(fmt.Errorf("--output %q: use text or json", o.output))
			}

			cfg.Complete(cmd.Flags())
			if err := cfg.Validate(); err != nil {
				return exit.UsageError(err)
			}

			return run(cmd.Context(), cfg, o, cmd.OutOrStdout())
		},
	}

	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "report the actions without executing them")
	cmd.Flags().BoolVar(&o.handBack, "hand-back", false, "prepare the node for an older shim")
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "output format: text or json")

	return cmd
}

func run(ctx context.Context, cfg *config.Config, o options, out io.Writer) error {
	s, err := newSurvey(ctx, cfg)
	if err != nil {
		return err
	}

	if !o.handBack {
		r := s.report()
		return writeResult(out, o, r, r.text, r.manualActions(), "before the daemon starts")
	}

	h := s.handBack()
	if !o.dryRun {
		unlock, err := process.LockDirectory("--cri-dockerd-root-directory", cfg.RootDirectory, 0)
		if err != nil {
			return fmt.Errorf("hand back: %w", err)
		}
		defer unlock()

		pins := podnet.NewPins(cfg.PinDirectory, cfg.PinRecords())
		if err := h.apply(checkpoint.New(cfg.RootDirectory), pins); err != nil {
			return err
		}
	}

	text := func(w io.Writer) { h.text(w, o.dryRun) }

	return writeResult(out, o, h, text, len(h.Drain), "before the older shim starts")
}

// writeResult writes the result in the requested format. It returns an error with the number of
// manual actions, if any.
func writeResult(out io.Writer, o options, result any, text func(io.Writer), manual int, when string) error {
	if o.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(result); err != nil {
			return fmt.Errorf("takeover: %w", err)
		}
	} else {
		text(out)
	}

	if manual > 0 {
		return &exit.Error{
			Err:  fmt.Errorf("takeover: %d actions required by hand %s", manual, when),
			Code: exit.ByHand,
		}
	}

	return nil
}
