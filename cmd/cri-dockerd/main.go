// Command cri-dockerd runs Kubernetes pods on Docker Engine. It serves the Container Runtime
// Interface (CRI) to the kubelet.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cri-dockerd/internal/check"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/daemon"
	"cri-dockerd/internal/exit"
	"cri-dockerd/internal/logs/driver"
	logprocess "cri-dockerd/internal/logs/process"
	"cri-dockerd/internal/takeover"
)

// version and commit are set by the linker (-X main.version=…). If empty, the build information
// recorded by Go applies.
var version, commit string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	err := newCommand().ExecuteContext(ctx)
	if err == nil {
		return
	}

	fmt.Fprintln(os.Stderr, "cri-dockerd:", err)
	os.Exit(exit.CodeOf(err))
}

// newCommand returns the command of the daemon with its subcommands.
func newCommand() *cobra.Command {
	cfg := &config.Config{}
	var showVersion, showBuild bool
	cmd := &cobra.Command{
		Use:   "cri-dockerd",
		Short: "Run Kubernetes pods on Docker Engine",
		Long: "cri-dockerd serves the Container Runtime Interface (CRI) to the kubelet and runs its pods " +
			"on Docker Engine.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return exit.UsageError(fmt.Errorf("unknown command %q (see %s --help)", args[0],
					cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case showVersion:
				fmt.Fprintln(cmd.OutOrStdout(), versionLine())
				return nil
			case showBuild:
				fmt.Fprint(cmd.OutOrStdout(), buildInfo())
				return nil
			}

			cfg.Complete(cmd.Flags())
			if err := cfg.Validate(); err != nil {
				return exit.UsageError(err)
			}

			log := cfg.Logger()
			log.Info("starting", "version", versionLine())

			return daemon.Run(cmd.Context(), cfg, versionLine(), log)
		},
	}

	cmd.SetFlagErrorFunc(flagError)
	cfg.Register(cmd.PersistentFlags())
	cmd.Flags().BoolVar(&showVersion, "version", false, "print the version and exit")
	cmd.Flags().BoolVar(&showBuild, "buildinfo", false, "print build information and exit")
	cmd.AddCommand(&cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), versionLine()) },
	})

	cmd.AddCommand(newLogDriverCommand(cfg))
	cmd.AddCommand(check.NewCommand(cfg), check.NewPageServerCommand(), newManCommand())
	cmd.AddCommand(takeover.NewCommand(cfg))
	cmd.PersistentFlags().VisitAll(showDefault)
	cmd.Flags().VisitAll(showDefault)

	return cmd
}

// newLogDriverCommand returns the subcommand of the log-driver process.
func newLogDriverCommand(cfg *config.Config) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   logprocess.Command,
		Short: "Write container logs (started by the daemon or systemd)",
		Long: `log-driver receives the output of containers from Docker and writes it to the log files of the kubelet.
It is a separate process, so restarts and upgrades of the daemon do not interrupt it. It can be stopped at
any time: the daemon or systemd restarts it, and no log lines are lost.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Complete(cmd.Flags())
			if err := cfg.Validate(); err != nil {
				return exit.UsageError(err)
			}

			return logprocess.Run(cmd.Context(), logprocess.Config{
				RunDirectory: cfg.RunDirectory,
				Socket:       socket,
				Version:      versionLine(),
				Log:          cfg.Logger(),
			})
		},
	}

	cmd.Flags().StringVar(&socket, "socket", driver.Socket,
		"socket of the Docker log driver plugin, unless systemd passes one")

	return cmd
}

// showDefault adds empty and zero defaults to --help. pflag omits them.
func showDefault(f *pflag.Flag) {
	switch f.DefValue {
	case "", "[]":
		f.Usage += ` (default "")`
	case "0", "0s", "false":
		f.Usage += " (default " + f.DefValue + ")"
	}
}

// flagError adds the most similar known flag to the error about an unknown flag.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return exit.UsageError(err)
	}

	hint := ""
	if nearest := config.Nearest(cmd.Flags(), unknown.GetSpecifiedName()); nearest != "" {
		hint = fmt.Sprintf("; did you mean --%s?", nearest)
	}

	return exit.UsageError(fmt.Errorf("%w%s (see %s --help)", err, hint, cmd.CommandPath()))
}

// versionLine returns "cri-dockerd <version> (<commit>)". Tools parse this format.
func versionLine() string { return fmt.Sprintf("cri-dockerd %s (%s)", versionNumber(), commitID()) }

func versionNumber() string {
	if info, ok := debug.ReadBuildInfo(); version == "" && ok {
		return info.Main.Version
	}
	return version
}

// commitID returns the abbreviated commit of the build, or "unknown".
func commitID() string {
	c := commit
	if info, ok := debug.ReadBuildInfo(); c == "" && ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				c = s.Value
			}
		}
	}

	if c == "" {
		return "unknown"
	}

	return c[:min(12, len(c))]
}

// buildInfo returns the version and Go's build information: toolchain, modules with checksums,
// settings.
func buildInfo() string {
	out := versionLine() + "\n"
	if info, ok := debug.ReadBuildInfo(); ok {
		out += info.String()
	}
	return out
}
