// Command cri-dockerd runs Kubernetes pods on Docker Engine: it serves the Container Runtime
// Interface to the kubelet and drives the engine.
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

// version and commit are set by the linker (-X main.version=…); without it what Go has recorded
// counts.
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

// newCommand is the command line: the daemon itself and its subcommands.
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
				return exit.UsageError(fmt.Errorf("unknown command %q; %s --help lists all", args[0],
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
	cmd.Flags().BoolVar(&showBuild, "buildinfo", false, "print how this program was built and exit")
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

// newLogDriverCommand is the process that writes container logs.
func newLogDriverCommand(cfg *config.Config) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   logprocess.Command,
		Short: "Write container logs; the daemon or systemd starts this",
		Long: "log-driver takes containers' output from Docker and writes it to the log files that the kubelet " +
			"reads. It is a process of its own, so that\n" +
			"neither a restart nor an upgrade of the daemon touches it. It may be ended at any time; the daemon or " +
			"systemd starts it again, and no line is lost.",
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

	cmd.Flags().StringVar(&socket, "socket", driver.Socket, "where Docker looks for the plugin, unless systemd "+
		"passes a socket")

	return cmd
}

// showDefault makes --help tell also the defaults that pflag leaves out, those that are empty or
// zero.
func showDefault(f *pflag.Flag) {
	switch f.DefValue {
	case "", "[]":
		f.Usage += ` (default "")`
	case "0", "0s", "false":
		f.Usage += " (default " + f.DefValue + ")"
	}
}

// flagError names the nearest known flag beside an unknown one.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return exit.UsageError(err)
	}

	hint := ""
	if nearest := config.Nearest(cmd.Flags(), unknown.GetSpecifiedName()); nearest != "" {
		hint = fmt.Sprintf("; the nearest known one is --%s", nearest)
	}

	return exit.UsageError(fmt.Errorf("%w%s; %s --help lists all", err, hint, cmd.CommandPath()))
}

// versionLine is "cri-dockerd <version> (<commit>)", as tools expect it.
func versionLine() string { return fmt.Sprintf("cri-dockerd %s (%s)", versionNumber(), commitID()) }

func versionNumber() string {
	if info, ok := debug.ReadBuildInfo(); version == "" && ok {
		return info.Main.Version
	}
	return version
}

// commitID is the commit from which this was built, shortened, or "unknown".
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

// buildInfo is the version, and how Go built it: toolchain, modules with their sums, settings.
func buildInfo() string {
	out := versionLine() + "\n"
	if info, ok := debug.ReadBuildInfo(); ok {
		out += info.String()
	}
	return out
}
