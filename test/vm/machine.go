package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// remoteDir is the directory of the scripts and programs on the node.
const remoteDir = "/opt/cri-vm"

// machine is the node of the steps.
type machine struct {
	name  string
	login string // the command that opens a shell on the node

	// command returns a command that runs a shell script as root on the node.
	command func(ctx context.Context, script string) *exec.Cmd
	// reboot restarts the node and waits for it; nil if it must not be restarted.
	reboot func(ctx context.Context) error
}

// host returns this machine.
func host() machine {
	return machine{name: "this machine", login: "sh", command: func(ctx context.Context, script string) *exec.Cmd {
		return exec.CommandContext(ctx, "sh", "-c", script)
	}}
}

// run runs a script with its output to out.
func (m machine) run(ctx context.Context, out io.Writer, script string) error {
	cmd := m.command(ctx, script)
	cmd.Stdout, cmd.Stderr = out, out
	return cmd.Run()
}

// send copies the content of a local directory below remoteDir.
func (m machine) send(ctx context.Context, local, remote string) error {
	dir := filepath.Join(remoteDir, remote)
	pack := exec.CommandContext(ctx, "tar", "-C", local, "-chf", "-", ".")
	unpack := m.command(ctx, "mkdir -p "+dir+" && tar --no-same-owner -xf - -C "+dir)
	pack.Stderr, unpack.Stdout, unpack.Stderr = os.Stderr, os.Stderr, os.Stderr

	var err error
	if unpack.Stdin, err = pack.StdoutPipe(); err != nil {
		return err
	}

	if err := pack.Start(); err != nil {
		return err
	}

	if err := unpack.Run(); err != nil {
		return fmt.Errorf("copy %s to the node: %w", local, err)
	}

	return pack.Wait()
}
