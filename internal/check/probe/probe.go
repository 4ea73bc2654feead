// Package probe gathers finding.Facts about a node. Small probes run in parallel, each with a
// timeout, so one blocked probe does not delay the others. Package probe does not evaluate facts
// and does not change the node.
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

// Timeout is the default timeout of each probe. Probes of a healthy node take milliseconds.
const Timeout = 1500 * time.Millisecond

// abandonDelay is the additional time before Gather abandons a probe that ignores its timeout, for
// example because of a blocked file system.
const abandonDelay = 500 * time.Millisecond

// Prober gathers facts about this node.
type Prober struct {
	root    string // prefix of all paths, for tests
	proc    proc.FS
	timeout time.Duration

	mu        sync.Mutex
	untrusted []finding.Untrusted // files with write access for users other than root
}

// New returns a Prober for this node. Each probe times out after timeout.
func New(timeout time.Duration) *Prober { return &Prober{proc: proc.Host(), timeout: timeout} }

// Gather runs all probes in parallel. cfg and found are the results of Adopt.
func (p *Prober) Gather(ctx context.Context, cfg *config.Config, found Adopted) *finding.Facts {
	f := p.initialFacts(cfg, found)
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

// collect runs the probes in parallel and adds their results to f. It abandons probes that exceed
// their timeout.
func (p *Prober) collect(ctx context.Context, f *finding.Facts, probes []func(context.Context) func(*finding.Facts)) {
	results := make(chan func(*finding.Facts), len(probes)) // buffered, so that abandoned probes can end
	for _, probe := range probes {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, p.timeout)
			defer cancel()
			results <- probe(ctx)
		}()
	}

	deadline := time.After(p.timeout + abandonDelay)
	for range probes {
		select {
		case addTo := <-results:
			addTo(f)
		case <-deadline:
			return
		}
	}
}

// initialFacts returns the facts before any probe has ended.
func (p *Prober) initialFacts(cfg *config.Config, found Adopted) *finding.Facts {
	const timedOut = "the probe timed out"

	return &finding.Facts{
		Root:    os.Geteuid() == 0,
		Systemd: p.exists("/run/systemd/system"),
		Debian:  p.exists("/usr/bin/apt-get"),
		Flags:   flags(cfg, found),
		Foreign: p.proc.Foreign(),
		Engine:  finding.Engine{Problem: finding.Silent, Error: timedOut, Installed: true},
		Daemon:  finding.Daemon{Problem: finding.Silent, Error: timedOut, Unit: found.Unit},
		Logs:    finding.LogDriver{Problem: finding.Silent, Error: timedOut, Socket: driver.Socket},
		CNI:     finding.CNI{Error: timedOut},
		Node:    finding.Node{Year: time.Now().Year()},
	}
}

// flags converts the configuration for package finding.
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

// read returns the trimmed content of a trusted file, "" for other files.
func (p *Prober) read(file string) string {
	b, err := p.trusted(file)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (p *Prober) glob(pattern string) []string {
	files, _ := filepath.Glob(p.path(pattern)) // the patterns are valid
	for i := range files {
		files[i] = strings.TrimPrefix(files[i], p.root)
	}
	return files
}
