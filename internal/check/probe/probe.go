// Package probe looks at a node and says what it sees, as finding.Facts: small probes, side by
// side, each with a deadline, so that nothing that hangs holds up the others. It judges nothing and
// changes nothing.
package probe

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/proc"
)

// Timeout is the deadline of each probe, unless the caller gives another; a healthy node answers in
// milliseconds.
const Timeout = 1500 * time.Millisecond

// grace is how much longer than its deadline a probe may take before it is given up, such as one
// that waits for a file system.
const grace = 500 * time.Millisecond

// Prober looks at this machine.
type Prober struct {
	root    string // before every path; for tests
	proc    proc.FS
	timeout time.Duration

	mu        sync.Mutex
	untrusted []finding.Untrusted // files that others can change
}

// New returns a Prober for this machine. Each probe times out after timeout.
func New(timeout time.Duration) *Prober { return &Prober{proc: proc.Host(), timeout: timeout} }

// Gather asks everybody at once. cfg are the daemon's flags as Adopt left them, found is what it
// returned.
func (p *Prober) Gather(ctx context.Context, cfg *config.Config, found Adopted) *finding.Facts {
	f := p.unanswered(cfg, found)
	fl := f.Flags
	probes := []func(context.Context) func(*finding.Facts){
		func(ctx context.Context) func(*finding.Facts) {
			e := p.engine(ctx, cfg)
			disks := p.disks(e.RootDir)
			return func(f *finding.Facts) { f.Engine, f.Node.Disks = e, disks }
		},
		func(ctx context.Context) func(*finding.Facts) {
			d := p.daemon(ctx, cfg, fl, found)
			return func(f *finding.Facts) { f.Daemon = d }
		},
		func(ctx context.Context) func(*finding.Facts) {
			l := p.logDriver(ctx)
			return func(f *finding.Facts) { f.Logs = l }
		},
		func(context.Context) func(*finding.Facts) {
			c := p.cni(cfg)
			return func(f *finding.Facts) { f.CNI = c }
		},
		func(ctx context.Context) func(*finding.Facts) {
			k := p.kubelet(ctx)
			return func(f *finding.Facts) { f.Kubelet = k }
		},
		func(ctx context.Context) func(*finding.Facts) {
			n := p.node(ctx, cfg, fl.Socket)
			return func(f *finding.Facts) { n.Disks = f.Node.Disks; f.Node = n }
		},
	}

	p.collect(ctx, f, probes)

	p.mu.Lock()
	defer p.mu.Unlock()

	f.Untrusted = append(f.Untrusted, p.untrusted...)

	return f
}

// collect runs the probes side by side and adds what they return to f. It does not wait for probes
// that take longer than their deadline.
func (p *Prober) collect(ctx context.Context, f *finding.Facts, probes []func(context.Context) func(*finding.Facts)) {
	answers := make(chan func(*finding.Facts), len(probes)) // as large as all, so that one that is given up can end
	for _, ask := range probes {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, p.timeout)
			defer cancel()
			answers <- ask(ctx)
		}()
	}

	end := time.After(p.timeout + grace)
	for range probes {
		select {
		case answer := <-answers:
			answer(f)
		case <-end:
			return
		}
	}
}

// unanswered are the facts while no probe has answered.
func (p *Prober) unanswered(cfg *config.Config, found Adopted) *finding.Facts {
	const why = "the probe did not end in time"

	return &finding.Facts{
		Root:    os.Geteuid() == 0,
		Systemd: p.exists("/run/systemd/system"),
		Debian:  p.exists("/usr/bin/apt-get"),
		Flags:   flags(cfg, found),
		Foreign: p.proc.Foreign(),
		Engine:  finding.Engine{Problem: finding.Silent, Error: why, Installed: true},
		Daemon:  finding.Daemon{Problem: finding.Silent, Error: why, Unit: found.Unit},
		Logs:    finding.LogDriver{Problem: finding.Silent, Error: why, Socket: driver.Socket},
		CNI:     finding.CNI{Error: why},
		Node:    finding.Node{Year: time.Now().Year()},
	}
}

// flags are what findings need of the configuration.
func flags(cfg *config.Config, found Adopted) finding.Flags {
	f := finding.Flags{
		Source:        found.Source,
		Endpoint:      found.Endpoint,
		Docker:        cfg.DockerEndpoint,
		NetworkPlugin: cfg.NetworkPlugin,
		CNIConfDir:    cfg.CNIConfDir,
		CNIBinDirs:    cfg.CNIBinDirs,
		RunDirectory:  cfg.RunDirectory,
		PauseImage:    cfg.PauseImage,
		ContainerLog:  cfg.ContainerLog,
		Command:       found.Command,
		Files:         found.Files,
		Mistake:       found.Mistake,
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

// read is the content of a trusted file without space around, "" if it is not to be read.
func (p *Prober) read(file string) string {
	b, err := p.trusted(file)
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
