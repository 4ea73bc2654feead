// Package probe looks at a node and says what it sees, as finding.Facts: small probes, side by side, each with a deadline, so that nothing
// that hangs holds up the others. It judges nothing and changes nothing.
package probe

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
)

// Patience is how long each probe waits for who is asked, unless somebody says otherwise; a healthy node answers in milliseconds.
const Patience = 1500 * time.Millisecond

// Prober looks at this machine.
type Prober struct {
	root string                                                                 // before every path; for tests
	run  func(ctx context.Context, name string, args ...string) (string, error) // runs a program and returns its standard output

	patience time.Duration
}

// New returns a Prober of this machine whose probes wait so long for who is asked.
func New(patience time.Duration) *Prober { return &Prober{run: output, patience: patience} }

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	return string(out), err
}

// Gather asks everybody at once. cfg are the daemon's flags as Adopt left them, found is what it returned.
func (p *Prober) Gather(ctx context.Context, cfg *config.Config, found Adopted) *finding.Facts {
	f := &finding.Facts{
		Root: os.Geteuid() == 0, Systemd: p.exists("/run/systemd/system"), Debian: p.exists("/usr/bin/apt-get"), Flags: flags(cfg, found),
	}
	var all sync.WaitGroup
	for _, look := range []func(context.Context){
		func(ctx context.Context) {
			f.Engine = p.engine(ctx, cfg)
			f.Node.Disks = p.disks(f.Engine.RootDir)
		},
		func(ctx context.Context) { f.Daemon = p.daemon(ctx, cfg, f.Flags, found) },
		func(ctx context.Context) { f.Logs = p.logDriver(ctx) },
		func(context.Context) { f.CNI = p.cni(cfg) },
		func(ctx context.Context) { f.Kubelet = p.kubelet(ctx) },
	} {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, p.patience)
			defer cancel()
			look(ctx)
		})
	}
	node := p.node(cfg, f.Flags.Socket)
	all.Wait()
	node.Disks = f.Node.Disks
	f.Node = node
	return f
}

// flags are what findings need of the configuration.
func flags(cfg *config.Config, found Adopted) finding.Flags {
	f := finding.Flags{
		Source: found.Source, Endpoint: found.Endpoint, Docker: cfg.DockerEndpoint, NetworkPlugin: cfg.NetworkPlugin, CNIConfDir: cfg.CNIConfDir,
		CNIBinDirs: cfg.CNIBinDirs, RunDirectory: cfg.RunDirectory, PauseImage: cfg.PauseImage, ContainerLog: cfg.ContainerLog,
		Command: found.Command, Files: found.Files, Mistake: found.Mistake,
	}
	if path, isUnix := strings.CutPrefix(f.Endpoint, "unix://"); isUnix {
		f.Socket = path
	}
	if f.Docker == "" {
		f.Docker = "DOCKER_HOST"
		if host := os.Getenv("DOCKER_HOST"); host != "" {
			f.Docker = host
		}
	}
	return f
}

func (p *Prober) path(file string) string { return p.root + file }

func (p *Prober) exists(file string) bool {
	_, err := os.Stat(p.path(file))
	return err == nil
}

// read is a file's content without space around, "" if it cannot be read.
func (p *Prober) read(file string) string {
	b, err := os.ReadFile(p.path(file))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (p *Prober) glob(pattern string) []string {
	files, _ := filepath.Glob(p.path(pattern)) // the only error is a pattern that is none
	for i := range files {
		files[i] = strings.TrimPrefix(files[i], p.root)
	}
	return files
}

// dial connects to a unix socket and says why that fails.
func dial(ctx context.Context, path string) (net.Conn, finding.Problem, error) {
	if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, finding.NoSocket, errors.New("it is no socket")
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	return c, problem(err), err
}

// problem is the kind of an error of a connection.
func problem(err error) finding.Problem {
	var timeout net.Error
	switch {
	case err == nil:
		return ""
	case errors.Is(err, syscall.ENOENT):
		return finding.Missing
	case errors.Is(err, syscall.ECONNREFUSED):
		return finding.Refused
	case errors.Is(err, os.ErrPermission):
		return finding.Denied
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return finding.Silent
	}
	return finding.Other
}
