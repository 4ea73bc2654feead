// Command vm runs tests of a whole node: the deb, systemd, cgroup v2, AppArmor, a reboot. The node
// is a virtual machine (hack/vm.sh builds its disk) or, with -host, this machine. The steps are
// scripts in the directory steps; each fails with a nonzero exit code.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"cri-dockerd/test/engines"
)

// options are the flags.
type options struct {
	host   bool
	steps  string
	dir    string
	resume bool
	keep   bool
	memory int // MiB
}

func main() {
	var o options
	flag.BoolVar(&o.host, "host", false, "run the steps on this machine: they reconfigure its Docker Engine")
	flag.StringVar(&o.steps, "steps", "", "steps to run, separated by spaces; STEP@29 and STEP@cgroupfs select "+
		"Docker 29 and the cgroupfs driver; none only boots (default: all)")
	flag.StringVar(&o.dir, "dir", filepath.Join(engines.Cache(), "vm", "run"),
		"directory of the run: disk, logs, results")
	flag.BoolVar(&o.resume, "resume", false, "keep the disk of the last run, and skip the steps that passed")
	flag.BoolVar(&o.keep, "keep", false, "keep the virtual machine running until an interrupt")
	flag.IntVar(&o.memory, "memory", 4096, "memory of the virtual machine in MiB")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

// run runs the selected steps and prints their report.
func run(ctx context.Context, o options) (err error) {
	selected, err := selectSteps(o.steps)
	if err != nil {
		return err
	}

	kind := "guest"
	if o.host {
		kind = "host"
		if err := lacks("/", os.Getuid()); err != nil {
			return err
		}
	}

	prepare := exec.CommandContext(ctx, "hack/vm.sh", kind)
	prepare.Stdout, prepare.Stderr = os.Stdout, os.Stderr
	if err := prepare.Run(); err != nil {
		return fmt.Errorf("hack/vm.sh %s: %w", kind, err)
	}

	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}

	results, err := openResults(o.dir, o.resume)
	if err != nil {
		return err
	}

	m := host()
	if !o.host {
		g, err := boot(ctx, o)
		if err != nil {
			return err
		}

		defer func() { err = errors.Join(err, g.stop()) }()

		m = g.machine()
	}

	err = runSteps(ctx, m, o.dir, selected, results)
	if o.keep && ctx.Err() == nil {
		if err != nil {
			fmt.Println(err)
		}
		fmt.Printf("the node keeps running until an interrupt: %s\n", m.login)
		<-ctx.Done()
	}

	return err
}

// lacks returns an error with the reasons if the steps cannot run on the machine with this root
// directory.
func lacks(root string, uid int) error {
	var reasons []string
	if uid != 0 {
		reasons = append(reasons, "not root")
	}
	if _, err := os.Stat(filepath.Join(root, "sys/fs/cgroup/cgroup.controllers")); err != nil {
		reasons = append(reasons, "/sys/fs/cgroup is not cgroup v2")
	}
	if _, err := os.Stat(filepath.Join(root, "run/systemd/system")); err != nil {
		reasons = append(reasons, "systemd is not process 1")
	}

	if reasons == nil {
		return nil
	}

	return fmt.Errorf("the steps cannot run on this machine: %s; run make vm without HOST", strings.Join(reasons, ", "))
}
