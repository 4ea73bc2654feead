// Package nri is the runtime side of NRI, the Node Resource Interface (github.com/containerd/nri).
// Plugins see the pods and containers of this node, and adjust containers before they start. The
// package translates between the records of package model and the messages of NRI, and keeps the
// adjustments of each container in a file for the containerd shim. NRI's own library talks to the
// plugins. See docs/adr/0012.
package nri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/text"
)

// Config holds the settings of a Runtime.
type Config struct {
	Socket    string // of the server for plugins
	PluginDir string // with plugins to start
	ConfigDir string // with the configurations of these plugins
	Validator string // file with the configuration of the default validator, "" for none
	BlockIO   string // file with the classes of block I/O, "" for none
	// RegistrationTimeout bounds the registration of a plugin, and RequestTimeout each of its
	// responses. NRI drops a plugin that exceeds one.
	RegistrationTimeout, RequestTimeout time.Duration
	Version                             string // of this program
	Log                                 *slog.Logger
}

// Node is the node that plugins see and change.
type Node interface {
	// Objects returns all pods and containers that plugins know or may know. No event is in
	// progress meanwhile.
	Objects() []Pod
	// Update carries out updates and evictions. It returns those that failed. Updates with
	// IgnoreFailure are never among them.
	Update(ctx context.Context, updates []Update, evictions []Eviction) (failed []Update)
	// UpdateLater does the same in the background. Plugins do not learn of failures.
	UpdateLater(updates []Update, evictions []Eviction)
}

// Runtime relays the events of pods and containers to plugins. It is safe for concurrent use.
type Runtime struct {
	cfg        Config
	adaptation *adaptation.Adaptation
	metrics    *metrics
	plugins    *pluginTable
	classes    map[string][]blockIORule
	node       Node
	started    chan struct{} // closed after Start
}

// New returns a Runtime. It connects no plugin before Start.
func New(cfg Config) (*Runtime, error) {
	validator, err := readValidator("", cfg.Validator)
	if err != nil {
		return nil, fmt.Errorf("--nri-validator-config: %w", err)
	}

	classes, err := readBlockIO("", cfg.BlockIO)
	if err != nil {
		return nil, fmt.Errorf("--nri-blockio-config: %w", err)
	}

	plugins := &pluginTable{plugins: map[string]*PluginState{}}
	r := &Runtime{
		cfg:     cfg,
		metrics: newMetrics(plugins),
		plugins: plugins,
		classes: classes,
		started: make(chan struct{}),
	}
	r.metrics.builtin = 1 // recorder
	if validator != nil && validator.Enable {
		r.metrics.builtin++
	}

	setLog(cfg.Log)
	adaptation.SetPluginRegistrationTimeout(cfg.RegistrationTimeout)
	adaptation.SetPluginRequestTimeout(cfg.RequestTimeout)

	r.adaptation, err = adaptation.New("cri-dockerd", cfg.Version, r.synchronize, r.update,
		adaptation.WithSocketPath(cfg.Socket),
		adaptation.WithPluginPath(cfg.PluginDir),
		adaptation.WithPluginConfigPath(cfg.ConfigDir),
		adaptation.WithMetrics(r.metrics),
		adaptation.WithBuiltinPlugins(recorder()),
		adaptation.WithDefaultValidator(validator),
		adaptation.WithTTRPCOptions(
			[]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(collectEvictions)},
			[]ttrpc.ServerOpt{sessionOption(plugins)},
		),
	)
	if err != nil {
		return nil, fmt.Errorf("NRI: %w", err)
	}

	return r, nil
}

// Start starts the plugins of the plugin directory and serves the socket. Call it once, when the
// node knows all its objects. Until then, Hold waits.
func (r *Runtime) Start(node Node) error {
	if err := checkPlugins(r.cfg.PluginDir); err != nil {
		return fmt.Errorf("--nri-plugin-dir: %w", err)
	}

	r.node = node
	if err := r.adaptation.Start(); err != nil {
		return fmt.Errorf("--nri-socket=%s: %w", r.cfg.Socket, err)
	}

	// The library creates the socket with the umask of the process.
	if err := os.Chmod(r.cfg.Socket, 0o600); err != nil {
		return fmt.Errorf("--nri-socket: %w", err)
	}
	close(r.started)

	return nil
}

// Close disconnects the plugins and ends those that Start has started.
func (r *Runtime) Close() error {
	r.adaptation.Stop()
	return nil
}

// checkPlugins returns an error if somebody else than root can change a plugin, because plugins run
// as root, or if the name of a plugin is invalid. A missing directory has none.
func checkPlugins(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}

	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		f, err := rootonly.Open("", filepath.Join(dir, e.Name()))
		if err != nil {
			return fmt.Errorf("plugin %s: %w", e.Name(), err)
		}
		_ = f.Close()

		if info, err := e.Info(); err == nil && !IsPluginName(e.Name(), info.Mode()) {
			return fmt.Errorf("plugin %s: its name has no index; rename it to NN-name, as in 10-logger, or make it "+
				"not executable (chmod a-x %s): %w", e.Name(), filepath.Join(dir, e.Name()), errdefs.ErrInvalidArgument)
		}
	}

	return nil
}

// IsPluginName reports whether NRI's library accepts a file in the directory of plugins. It skips
// files that are not executable. With any other file it starts no plugin at all.
func IsPluginName(name string, mode fs.FileMode) bool {
	_, _, err := api.ParsePluginName(name)
	return mode.IsDir() || mode&0o111 == 0 || err == nil
}

// Hold delays the registration of plugins until release. An object that is announced to plugins and
// becomes visible under one hold reaches each plugin once: in Synchronize, or as an event. Hold
// waits for Start and for a registration in progress. A caller must hold once only, and must not
// wait for locks of containers meanwhile: their holders may wait for Hold.
func (r *Runtime) Hold(ctx context.Context) (release func(), err error) {
	select {
	case <-r.started:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the start of NRI plugins: %w", context.Cause(ctx))
	}

	// The library's lock knows no ctx.
	held := make(chan *adaptation.PluginSyncBlock)
	go func() {
		block := r.adaptation.BlockPluginSync()
		select {
		case held <- block:
		case <-ctx.Done():
			block.Unblock()
		}
	}()

	select {
	case block := <-held:
		return block.Unblock, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the registration of an NRI plugin: %w", context.Cause(ctx))
	}
}

// synchronize gives a new plugin all objects (adaptation.SyncFn). The library admits no Hold
// meanwhile.
func (r *Runtime) synchronize(ctx context.Context, plugin adaptation.SyncCB) error {
	var pods []*api.PodSandbox
	var containers []*api.Container
	for _, p := range r.node.Objects() {
		pods = append(pods, toPod(p))
		for _, c := range p.Containers {
			containers = append(containers, toContainer(p, c))
		}
	}

	updates, err := plugin(ctx, pods, containers)
	if err != nil {
		return err
	}

	// Updates need the locks of containers, whose holders may wait for Hold.
	if len(updates) > 0 {
		r.node.UpdateLater(fromUpdates(updates), nil)
	}

	return nil
}

// update carries out updates that a plugin requests by itself (adaptation.UpdateFn).
func (r *Runtime) update(ctx context.Context, updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	select {
	case <-r.started:
	default:
		return updates, fmt.Errorf("the runtime is starting: %w", errdefs.ErrUnavailable)
	}

	ctx, cancel := context.WithTimeout(ctx, r.cfg.RequestTimeout)
	defer cancel()

	failed := r.node.Update(ctx, fromUpdates(updates), evictionsOf(ctx))
	var out []*api.ContainerUpdate
	for _, f := range failed {
		out = append(out, f.message)
	}

	return out, nil
}

// fail returns the error of an event. The text of plugins is bounded. Unless the caller has given
// up, the kind is FailedPrecondition.
func fail(ctx context.Context, event string, id model.ContainerID, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("NRI %s of %s: %w", event, id, context.Cause(ctx))
	}
	return fmt.Errorf("NRI %s of %s: %s: %w", event, id, text.Clean(err.Error(), text.MaxMessage),
		errdefs.ErrFailedPrecondition)
}
