// Command cri-dockerd is the CRI server for Docker Engine: it lets a kubelet run pods on Docker.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cri-dockerd/internal/check"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/daemon"
)

// version is set when a release is built.
var version = "0.0.0-dev"

// Exit codes.
const (
	exitFailed = 1 // the daemon could not start or go on, or a check failed
	exitUsage  = 2 // the command line is wrong
)

func main() {
	if err := newCommand().ExecuteContext(context.Background()); err != nil {
		var u usageError
		fmt.Fprintln(os.Stderr, "cri-dockerd:", err)
		if errors.As(err, &u) {
			os.Exit(exitUsage)
		}
		os.Exit(exitFailed)
	}
}

// usageError is a mistake on the command line.
type usageError struct{ error }

func newCommand() *cobra.Command {
	cfg := &config.Config{}
	var showVersion, showBuild bool
	root := &cobra.Command{
		Use:           "cri-dockerd",
		Short:         "Run Kubernetes on Docker Engine",
		Long:          "cri-dockerd serves the Container Runtime Interface on top of Docker Engine, so that a kubelet can run pods on it.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unexpected argument %q; see cri-dockerd --help", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case showVersion:
				printVersion(cmd)
				return nil
			case showBuild:
				return printBuild(cmd)
			}
			if err := cfg.Validate(cmd.Flags()); err != nil {
				return usageError{err}
			}
			return daemon.Run(cmd.Context(), cfg, cfg.Logger())
		},
	}
	cfg.Register(root.PersistentFlags())
	root.Flags().BoolVar(&showVersion, "version", false, "print the version and exit")
	root.Flags().BoolVar(&showBuild, "buildinfo", false, "print how the program was built and exit")
	root.PersistentFlags().SortFlags = false
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(
		&cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, Run: func(cmd *cobra.Command, _ []string) { printVersion(cmd) }},
		check.NewCommand(cfg), check.NewPageServerCommand(),
	)
	return root
}

// flagError names the flag that may have been meant.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		name := strings.TrimLeft(unknown.GetSpecifiedName(), "-")
		if near := config.Nearest(cmd.Flags(), name); near != "" {
			return usageError{fmt.Errorf("unknown flag --%s; did you mean --%s?", name, near)}
		}
		return usageError{fmt.Errorf("unknown flag --%s; see cri-dockerd --help", name)}
	}
	return usageError{err}
}

func printVersion(cmd *cobra.Command) {
	commit := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	fmt.Fprintf(cmd.OutOrStdout(), "cri-dockerd %s (%s)\n", version, commit)
}

func printBuild(cmd *cobra.Command) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("the program was built without build information")
	}
	fmt.Fprint(cmd.OutOrStdout(), info)
	return nil
}
