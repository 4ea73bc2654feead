package takeover

import (
	"context"
	"log/slog"
	"net/netip"
	"os"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/spec"
)

// survey is all that is known of a node's pods: what Docker, libcni's cache and the notes of older
// shims say. Everything below it is decided without another look.
type survey struct {
	host    spec.Host
	plugin  string // --network-plugin
	objects []spec.Object
	misfits []engine.Misfit
	cache   map[string]podnet.Connection // by sandbox ID
	// addresses in the network namespaces of pods that are not in the cache
	found map[string][]netip.Addr
	notes map[string]note // by sandbox ID
	// what the log paths of containers lead to, by container ID; "" where there is no link
	links  map[string]string
	pinned map[string]bool // sandboxes whose network namespace we have pinned
}

// note is an older shim's checkpoint.
type note struct {
	file string
	checkpoint.Checkpoint
	problem string // why it cannot be read
}

// look reads everything and changes nothing.
func look(ctx context.Context, cfg *config.Config) (*survey, error) {
	docker, err := engine.New(engine.Config{
		Endpoint: cfg.DockerEndpoint,
		Log:      slog.New(slog.DiscardHandler),
		Dial:     rootonly.EngineDial(cfg.DockerEndpoint),
	})
	if err != nil {
		return nil, err
	}
	defer docker.Close()

	s := &survey{
		plugin: cfg.NetworkPlugin,
		found:  map[string][]netip.Addr{},
		notes:  map[string]note{},
		links:  map[string]string{},
		pinned: map[string]bool{},
	}
	if s.host, err = docker.Host(ctx); err != nil {
		return nil, err
	}

	if s.objects, err = docker.Objects(ctx); err != nil {
		return nil, err
	}

	if s.misfits, err = docker.Misfits(ctx); err != nil {
		return nil, err
	}

	if s.cache, err = podnet.ReadCache(cfg.CNICacheDir); err != nil {
		return nil, err
	}

	s.readNotes(checkpoint.New(cfg.RootDirectory, checkpoint.Dockershim))
	for _, id := range podnet.NewPins(cfg.PinDirectory, cfg.PinRecords()).List() {
		s.pinned[string(id)] = true
	}

	for _, o := range s.objects {
		s.lookAt(o)
	}

	return s, nil
}

func (s *survey) readNotes(files checkpoint.Files) {
	for _, id := range files.List() {
		n := note{file: files.Path(id)}
		c, err := files.Read(id)
		if err != nil {
			n.problem = err.Error()
		}
		n.Checkpoint = c
		s.notes[string(id)] = n
	}
}

// lookAt reads what the node knows of one container beyond Docker.
func (s *survey) lookAt(o spec.Object) {
	if sb := o.Sandbox; sb != nil && sb.Running && sb.IsWithoutNetwork() && len(s.cache[string(sb.ID)].Addresses) == 0 {
		s.found[string(sb.ID)] = podnet.Addresses(sb.ID, sb.Pid)
	}

	if c := o.Container; c != nil && c.LogPath != "" {
		if target, err := os.Readlink(c.LogPath); err == nil {
			s.links[string(c.ID)] = target
		}
	}
}
