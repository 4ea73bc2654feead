// Package takeover is `cri-dockerd takeover`: it tells an operator what pods of older Docker shims
// this daemon would adopt, and hands a node's pods back to such a shim. It changes nothing that
// runs.
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

const long = `takeover --dry-run lists the pods on this node that the daemon adopts when it starts, older shims' and its own, and what is odd about
them. It changes nothing; the older shim and the kubelet may run meanwhile.

takeover --hand-back prepares the way back to an older shim, when this daemon has been stopped: it writes the notes with which that shim
tears pods down, and names the pods that must be drained first. With --dry-run it only says so.

Give the flags that the daemon has, if they are not the defaults. docs/migrate.md has the steps.

Exit codes: 0 nothing is left to do by hand, 3 something is, 1 it failed, 2 a mistake on the command line.`

// options are the command's own flags.
type options struct {
	dryRun, handBack bool
	output           string
}

// NewCommand is the subcommand takeover. cfg says where Docker listens and where files lie.
func NewCommand(cfg *config.Config) *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "takeover",
		Short: "List pods of older shims that would be adopted, or hand pods back",
		Long:  long,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !o.dryRun && !o.handBack {
				return exit.UsageError(errors.New("takeover: give --dry-run or --hand-back; the daemon itself " +
					"adopts what is there when it starts"))
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

	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "say what would be done and change nothing")
	cmd.Flags().BoolVar(&o.handBack, "hand-back", false, "prepare the way back to an older shim")
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "text or json")

	return cmd
}

func run(ctx context.Context, cfg *config.Config, o options, out io.Writer) error {
	s, err := look(ctx, cfg)
	if err != nil {
		return err
	}

	if !o.handBack {
		r := s.report()
		return show(out, o, r, r.text, r.byHand(), "before the daemon starts")
	}

	h := s.handBack()
	if !o.dryRun {
		unlock, err := process.LockDirectory("--cri-dockerd-root-directory", cfg.RootDirectory, 0)
		if err != nil {
			return fmt.Errorf("hand back: %w", err)
		}
		defer unlock()

		if err := h.do(checkpoint.New(cfg.RootDirectory), podnet.NewPins(cfg.PinDirectory, cfg.PinRecords())); err !=
			nil {
			return err
		}
	}

	return show(out, o, h, func(w io.Writer) { h.text(w, o.dryRun) }, len(h.Drain), "before the older shim starts")
}

// show writes an answer in the form that was asked for; the error tells how much is left to do by
// hand.
func show(out io.Writer, o options, answer any, text func(io.Writer), byHand int, when string) error {
	if o.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(answer); err != nil {
			return fmt.Errorf("takeover: %w", err)
		}
	} else {
		text(out)
	}

	if byHand > 0 {
		return &exit.Error{
			Err:  fmt.Errorf("takeover: %d things to do by hand %s", byHand, when),
			Code: exit.ByHand,
		}
	}

	return nil
}
