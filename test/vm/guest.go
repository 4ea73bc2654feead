package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cri-dockerd/test/engines"
)

const (
	bootTimeout = 10 * time.Minute // without KVM on two busy cores a boot takes one to two minutes
	stopTimeout = 2 * time.Minute
	kvmTimeout  = 20 * time.Second // for the first line of the kernel
)

// guest is a running virtual machine with a disk of its own on top of the built one.
type guest struct {
	dir  string // of disk, serial console and SSH connection
	port int    // of SSH, on the loopback address
	qemu *exec.Cmd
	done chan error // the result of qemu
}

// image returns the path of a file made by hack/vm.sh.
func image(name string) string { return filepath.Join(engines.Cache(), "vm", name) }

// boot starts the virtual machine in the directory of the run and waits until SSH works. Its
// network reaches nothing outside of it.
func boot(ctx context.Context, o options) (*guest, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}

	g := &guest{dir: o.dir, port: port, done: make(chan error, 1)}
	disk := filepath.Join(g.dir, "disk.qcow2")
	if _, err := os.Stat(disk); err != nil || !o.resume {
		out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image("disk.img"),
			disk).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("qemu-img: %w\n%s", err, out)
		}
	}

	accel := accelerator(ctx)
	args := append([]string{
		"-smp", "3", "-m", strconv.Itoa(o.memory),
		"-append", "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 hugepages=32",
		"-drive", "if=virtio,format=qcow2,cache=unsafe,file=" + disk,
		"-netdev", fmt.Sprintf("user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:%d-:22", port),
		"-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci",
		"-serial", "file:" + filepath.Join(g.dir, "serial.log"),
	}, qemuArgs(accel)...)
	g.qemu = exec.Command("qemu-system-x86_64", args...)
	g.qemu.Stderr = os.Stderr
	g.qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt of the terminal must not end it
	if err := g.qemu.Start(); err != nil {
		return nil, err
	}

	go func() { g.done <- g.qemu.Wait() }()

	begin := time.Now()
	if err := g.await(ctx, ""); err != nil {
		return nil, errors.Join(err, g.stop())
	}

	fmt.Printf("the virtual machine (%s) is up after %s; shell: %s\n", accel, time.Since(begin).Round(time.Second),
		strings.Join(g.ssh(), " "))

	return g, nil
}

// qemuArgs returns the arguments for the kernel and the processor.
func qemuArgs(accel string) []string {
	if accel == "tcg" {
		accel = "tcg,thread=multi,tb-size=512"
	}

	return []string{
		"-machine", "q35", "-accel", accel, "-cpu", "max", "-display", "none", "-nodefaults",
		"-kernel", image("vmlinuz"), "-initrd", image("initrd"),
	}
}

// accelerator returns kvm if a kernel really boots with it, else tcg. A device file is not enough.
func accelerator(ctx context.Context) string {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return "tcg"
	} else {
		f.Close()
	}

	ctx, cancel := context.WithTimeout(ctx, kvmTimeout)
	defer cancel()

	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(qemuArgs("kvm"), "-m", "512", "-no-reboot",
		"-serial", "stdio", "-append", "console=ttyS0 panic=-1 root=/dev/none")...)
	var serial bytes.Buffer
	cmd.Stdout = watcher{&serial, []byte("Linux version"), cancel}
	_ = cmd.Run() // ends by cancel or with the guest
	if bytes.Contains(serial.Bytes(), []byte("Linux version")) {
		return "kvm"
	}

	return "tcg"
}

// watcher collects output and calls found when it contains text.
type watcher struct {
	all   *bytes.Buffer
	text  []byte
	found func()
}

func (w watcher) Write(b []byte) (int, error) {
	w.all.Write(b)
	if bytes.Contains(w.all.Bytes(), w.text) {
		w.found()
	}

	return len(b), nil
}

// freePort returns a free port of the loopback address.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()

	return l.Addr().(*net.TCPAddr).Port, nil
}

// ssh returns the command line to run a command as root.
func (g *guest) ssh() []string {
	return []string{
		"ssh", "-i", image("key"), "-p", strconv.Itoa(g.port), "-o", "StrictHostKeyChecking=no",
		"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20",
		"-o", "ServerAliveInterval=60", "-o", "ServerAliveCountMax=10", "root@127.0.0.1",
	}
}

// machine returns the guest as the node of the steps.
func (g *guest) machine() machine {
	return machine{
		name:    "virtual machine",
		login:   strings.Join(g.ssh(), " "),
		command: g.command,
		reboot: func(ctx context.Context) error {
			id, err := g.bootID(ctx)
			if err != nil {
				return err
			}

			_ = g.command(ctx, "systemctl reboot").Run() // the connection may end first
			return g.await(ctx, id)
		},
	}
}

// command returns a command that runs a shell script in the guest.
func (g *guest) command(ctx context.Context, script string) *exec.Cmd {
	args := append(g.ssh(), script)
	return exec.CommandContext(ctx, args[0], args[1:]...)
}

// bootID returns the kernel's ID of this boot.
func (g *guest) bootID(ctx context.Context) (string, error) {
	out, err := g.command(ctx, "cat /proc/sys/kernel/random/boot_id").Output()
	return strings.TrimSpace(string(out)), err
}

// await waits until SSH works after a boot with another ID than before, and systemd has started
// its units.
func (g *guest) await(ctx context.Context, before string) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()

	for {
		if id, err := g.bootID(ctx); err == nil && id != before {
			_ = g.command(ctx, "systemctl is-system-running --wait").Run() // degraded is for the steps to judge
			return ctx.Err()
		}

		select {
		case err := <-g.done:
			g.done <- err
			return fmt.Errorf("qemu ended: %w; see %s/serial.log", err, g.dir)
		case <-ctx.Done():
			return fmt.Errorf("boot: %w; see %s/serial.log", ctx.Err(), g.dir)
		case <-time.After(time.Second):
		}
	}
}

// stop turns the guest off.
func (g *guest) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()

	_ = g.command(ctx, "systemctl poweroff").Run() // the connection may end first
	select {
	case err := <-g.done:
		return err
	case <-ctx.Done():
	}

	if err := g.qemu.Process.Kill(); err != nil {
		return err
	}
	<-g.done

	return errors.New("the virtual machine did not turn off and was killed")
}
