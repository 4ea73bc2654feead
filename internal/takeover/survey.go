package takeover

import (
	"context"
	"log/slog"
	"net/netip"
	"os"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/rootonly"
)

// survey is the state of a node's pods according to Docker, libcni's cache and the checkpoints of
// older shims. Reports are derived from it without further I/O.
type survey struct {
	host    model.Host
	plugin  string // --network-plugin
	objects []model.Object
	misfits []engine.Misfit
	cache   map[string]podnet.Connection // by sandbox ID
	// addresses in the network namespaces of pods without a cache entry
	nsAddresses map[string][]netip.Addr
	checkpoints map[string]checkpointFile // by sandbox ID
	// link targets of containers' log paths by container ID; "" without a link
	logLinks map[string]string
	pinned   map[string]bool // sandboxes with a network namespace pinned by us
}

// checkpointFile is an older shim's checkpoint.
type checkpointFile struct {
	file string
	checkpoint.Checkpoint
	problem string // why it is unreadable
}

// newSurvey reads the state of the node without changing it.
func newSurvey(ctx context.Context, cfg *config.Config) (*survey, error) {
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
		plugin:      cfg.NetworkPlugin,
		nsAddresses: map[string][]netip.Addr{},
		checkpoints: map[string]checkpointFile{},
		logLinks:    map[string]string{},
		pinned:      map[string]bool{},
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

	s.readCheckpoints(checkpoint.New(cfg.RootDirectory, checkpoint.Dockershim))
	for _, id := range podnet.NewPins(cfg.PinDirectory, cfg.PinRecords()).List() {
		s.pinned[string(id)] = true
	}

	for _, o := range s.objects {
		s.addObject(o)
	}

	return s, nil
}

func (s *survey) readCheckpoints(files checkpoint.Files) {
	for _, id := range files.List() {
		n := checkpointFile{file: files.Path(id)}
		c, err := files.Read(id)
		if err != nil {
			n.problem = err.Error()
		}
		n.Checkpoint = c
		s.checkpoints[string(id)] = n
	}
}

// addObject reads the node's state of one container in addition to Docker's.
func (s *survey) addObject(o model.Object) {
	if sb := o.Sandbox; sb != nil && sb.Running && sb.IsWithoutNetwork() && len(s.cache[string(sb.ID)].Addresses) == 0 {
		s.nsAddresses[string(sb.ID)] = podnet.Addresses(sb.ID, sb.Pid)
	}

	if c := o.Container; c != nil && c.LogPath != "" {
		if target, err := os.Readlink(c.LogPath); err == nil {
			s.logLinks[string(c.ID)] = target
		}
	}
}
