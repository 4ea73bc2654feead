// Package probe gathers finding.Facts about a node. Small probes run in parallel, each with a
// timeout, so one blocked probe does not delay the others. Package probe does not evaluate facts
// and does not change the node.
package probe

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/proc"
)

// Timeout is the default time after which a service counts as slow, and the timeout of probes that
// call no service. Probes of a healthy node take milliseconds.
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

// New returns a Prober for this node. Services that respond after timeout count as slow.
func New(timeout time.Duration) *Prober { return &Prober{proc: proc.Host(), timeout: timeout} }

// probe gathers facts until ctx ends.
type probe func(ctx context.Context) result

// result adds facts to those of the node.
type result func(*finding.Facts)

// Gather runs all probes in parallel. cfg and found are the results of Adopt.
func (p *Prober) Gather(ctx context.Context, cfg *config.Config, found Adopted) *finding.Facts {
	f := p.initialFacts(cfg, found)
	fl := f.Flags
	services := []probe{
		func(ctx context.Context) result {
			e := p.engine(ctx, cfg)
			disks := p.disks(e.RootDir)
			return func(f *finding.Facts) { f.Engine, f.Node.Disks = e, disks }
		},
		func(ctx context.Context) result {
			d := p.daemon(ctx, cfg, fl, found)
			return func(f *finding.Facts) { f.Daemon = d }
		},
		func(ctx context.Context) result {
			l := p.logDriver(ctx)
			return func(f *finding.Facts) { f.Logs = l }
		},
	}

	files := []probe{
		func(context.Context) result {
			c := p.cni(cfg)
			return func(f *finding.Facts) { f.CNI = c }
		},
		func(ctx context.Context) result {
			k := p.kubelet(ctx)
			return func(f *finding.Facts) { f.Kubelet = k }
		},
		func(context.Context) result {
			n := p.nri(cfg)
			return func(f *finding.Facts) { f.NRI = n }
		},
		func(ctx context.Context) result {
			n := p.node(ctx, cfg, fl.Socket)
			return func(f *finding.Facts) { n.Disks = f.Node.Disks; f.Node = n }
		},
	}

	ofFiles, ofServices := begin(ctx, p.timeout, files), begin(ctx, p.limit(), services)
	for _, addTo := range slices.Concat(ofFiles(), ofServices()) {
		addTo(f)
	}

	p.mu.Lock()
	defer p.mu.Unlock()

	f.Untrusted = append(f.Untrusted, p.untrusted...)

	return f
}

// begin runs probes in parallel, each with a timeout, and returns a function that waits for their
// results. It abandons probes that exceed their timeout.
func begin(ctx context.Context, timeout time.Duration, probes []probe) (wait func() []result) {
	results := make(chan result, len(probes)) // buffered, so that abandoned probes can end
	for _, probe := range probes {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			results <- probe(ctx)
		}()
	}

	deadline := time.After(timeout + abandonDelay)

	return func() (all []result) {
		for range probes {
			select {
			case r := <-results:
				all = append(all, r)
			case <-deadline:
				return all
			}
		}
		return all
	}
}

// initialFacts returns the facts before any probe has ended.
func (p *Prober) initialFacts(cfg *config.Config, found Adopted) *finding.Facts {
	const timedOut = "the probe timed out"
	limit := p.limit()

	return &finding.Facts{
		Root:    os.Geteuid() == 0,
		Systemd: p.exists("/run/systemd/system"),
		Debian:  p.exists("/usr/bin/apt-get"),
		Flags:   flags(cfg, found),
		Foreign: p.proc.Foreign(),
		Engine:  finding.Engine{Problem: finding.Silent, Slow: limit, Error: timedOut, Installed: true},
		Daemon:  finding.Daemon{Problem: finding.Silent, Slow: limit, Error: timedOut, Unit: found.Unit},
		Logs:    finding.LogDriver{Problem: finding.Silent, Slow: limit, Error: timedOut, Socket: driver.Socket},
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
		Containers:    cfg.Containers,
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
