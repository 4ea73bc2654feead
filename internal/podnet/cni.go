package podnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"

	"cri-dockerd/internal/keylock"
)

// CNIConfig holds the paths and dependencies of a CNI network.
type CNIConfig struct {
	ConfDir  string   // of network configurations
	BinDirs  []string // of plugins
	CacheDir string   // of libcni
	// Pins returns the addresses of pods with a damaged cache entry; nil for none.
	Pins     *Pins
	Observer *Observer // nil for none
	Log      *slog.Logger
}

// CNI is the network described by a configuration directory: its first valid file in name order. It
// follows changes of the directory.
type CNI struct {
	cfg    CNIConfig
	attach *attacher
	watch  *confWatch

	// reading serialises reloads, so that an older configuration never replaces a newer one.
	reading keylock.Map
	unused  map[string]string // reason by unused file; guarded by reading
	changed chan struct{}     // holds one element after plugins were installed or uninstalled

	mu      sync.RWMutex // guards the fields below
	current *libcni.NetworkConfigList
	problem error    // why there is no current configuration
	status  error    // the last result of STATUS
	broken  []string // descriptions of invalid and stale files
	stale   []string // the missing main plugins of unused files
	ranges  []netip.Prefix
}

// maxNoticed bounds the number of files in a notice.
const maxNoticed = 5

var _ Network = (*CNI)(nil)

// Intervals of STATUS for plugins of version 1.1 or newer, while they are ready and while they are
// not.
const (
	statusInterval      = 10 * time.Second
	statusRetryInterval = time.Second
)

var errNoStatus = errors.New("the STATUS of its plugins is not known yet")

// NewCNI reads the configuration, which may be created later. Run follows it.
func NewCNI(cfg CNIConfig) (*CNI, error) {
	attach, err := newAttacher(cfg.BinDirs, cfg.CacheDir, cfg.Pins, cfg.Observer, cfg.Log)
	if err != nil {
		return nil, err
	}

	c := &CNI{
		cfg:     cfg,
		attach:  attach,
		watch:   newConfWatch(cfg.ConfDir, cfg.Log),
		changed: make(chan struct{}, 1),
	}

	c.watch.update()
	c.reloadLocked(func(*libcni.NetworkConfigList) error { return errNoStatus })

	return c, nil
}

// Run implements Network. It follows the configuration directory and the plugins' STATUS.
// Reinstalled plugins release their resources of removed pods.
func (c *CNI) Run(ctx context.Context) {
	var owed sync.WaitGroup
	owed.Go(func() { c.attach.run(ctx) })
	defer owed.Wait()
	c.follow(ctx)
	<-ctx.Done()
}

func (c *CNI) follow(ctx context.Context) {
	ask := time.NewTimer(0)
	defer ask.Stop()

	status := func(list *libcni.NetworkConfigList) error { return c.attach.status(ctx, list) }
	for {
		events, problems := c.watch.updates()
		select {
		case <-ctx.Done():
			return
		case _, ok := <-events:
			if !ok {
				return
			}

		case err, ok := <-problems:
			if !ok {
				return
			}
			c.cfg.Log.Warn("error watching the CNI configuration", "dir", c.cfg.ConfDir, "err", err)

		case <-ask.C:
		case <-c.changed:
		}

		c.watch.update()
		next := statusInterval
		if c.watch.notice() != "" {
			next = pollEvery
		}
		if !c.reload(ctx, status) {
			next = statusRetryInterval
		}

		ask.Reset(next)
	}
}

// Reload reads the configuration and runs STATUS without waiting for a change.
func (c *CNI) Reload(ctx context.Context) {
	c.watch.update()
	c.reload(ctx, func(list *libcni.NetworkConfigList) error { return c.attach.status(ctx, list) })
}

// reload reads the configuration, runs STATUS and reports whether the plugins are ready.
func (c *CNI) reload(ctx context.Context, status func(*libcni.NetworkConfigList) error) (ready bool) {
	unlock, err := c.reading.Lock(ctx, "")
	if err != nil {
		return false
	}
	defer unlock()
	return c.reloadLocked(status)
}

func (c *CNI) reloadLocked(status func(*libcni.NetworkConfigList) error) (ready bool) {
	unused := map[string]string{}
	var broken, stale []string
	list, err := firstUsable(c.cfg.ConfDir, c.cfg.BinDirs, func(file string, err error) {
		// Log once, since the file is read every few seconds.
		if unused[file] = err.Error(); c.unused[file] != err.Error() {
			c.cfg.Log.Warn("skipping an unusable CNI configuration", "file", file, "err", err)
		}

		var noPlugin *staleError
		if errors.As(err, &noPlugin) {
			stale = append(stale, noPlugin.plugin)
			broken = append(broken, fmt.Sprintf("%s is skipped: %v", file, err))
		} else {
			broken = append(broken, file+" is invalid and skipped")
		}
	})

	c.unused = unused
	var statusErr error
	if list != nil && hasGC(list) {
		statusErr = status(list)
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	if list != nil && (c.current == nil || string(c.current.Bytes) != string(list.Bytes)) {
		c.cfg.Log.Info("using CNI configuration", "network", list.Name, "dir", c.cfg.ConfDir)
	}
	isNew := statusErr != nil && (c.status == nil || c.status.Error() != statusErr.Error())
	if isNew && !errors.Is(statusErr, errNoStatus) {
		c.cfg.Log.Warn("CNI plugins are not ready", "err", statusErr)
	}

	c.current, c.problem, c.status = list, err, statusErr
	c.broken, c.stale = broken, stale

	return statusErr == nil
}

// ConfFile is a network configuration found by Inspect.
type ConfFile struct {
	File    string
	Network string   // name of the network
	Plugins []string // required programs in order, including IPAM plugins
	Err     error    // why the file is invalid
}

// Inspect reads all configurations of a directory in name order, like NewCNI. The first valid one
// is in use. It does not read a file if allowed returns an error.
func Inspect(dir string, allowed func(file string) error) ([]ConfFile, error) {
	files, err := configFiles(dir)
	if err != nil {
		return nil, err
	}

	var all []ConfFile
	for _, f := range files {
		c := ConfFile{File: f}
		if c.Err = allowed(f); c.Err != nil {
			all = append(all, c)
			continue
		}

		list, err := readConfig(f)
		if err == nil {
			err = checkNetwork(list)
		}

		if c.Err = err; err == nil {
			c.Network, c.Plugins = list.Name, requiredPlugins(list)
		}

		all = append(all, c)
	}

	return all, nil
}

// Find returns the path of a plugin, or an error if none of the directories has it.
func Find(name string, binDirs []string) (string, error) {
	return (*plugins)(nil).FindInPath(name, binDirs)
}

// requiredPlugins returns the programs required by a configuration.
func requiredPlugins(list *libcni.NetworkConfigList) []string {
	var all []string
	for _, p := range list.Plugins {
		for _, name := range []string{p.Network.Type, ipamPlugin(p)} {
			if name != "" && !slices.Contains(all, name) {
				all = append(all, name)
			}
		}
	}

	return all
}

// checkInstalled returns an error with the name of the first missing plugin of a configuration.
func checkInstalled(list *libcni.NetworkConfigList, binDirs []string) error {
	for _, name := range requiredPlugins(list) {
		if _, err := Find(name, binDirs); err != nil {
			return fmt.Errorf("network %s: %w", list.Name, err)
		}
	}
	return nil
}

func (c *CNI) config() (*libcni.NetworkConfigList, []netip.Prefix, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.current, c.ranges, c.problem
}

// Add implements Connector.
func (c *CNI) Add(ctx context.Context, p Pod) ([]netip.Addr, error) {
	list, ranges, err := c.config()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return c.attach.add(ctx, list, p, ranges)
}

// Confirm implements Connector.
func (c *CNI) Confirm(id string) error { return c.attach.confirm(id) }

// Del implements Connector.
func (c *CNI) Del(ctx context.Context, p Pod) error {
	list, _, _ := c.config() // without a configuration, the cache still has the one of the ADD
	return c.attach.del(ctx, list, p)
}

// Check implements Connector.
func (c *CNI) Check(ctx context.Context, p Pod) error { return c.attach.check(ctx, p) }

// Collect implements Connector.
func (c *CNI) Collect(ctx context.Context) error {
	list, _, err := c.config()
	if err != nil {
		return nil // no plugins to run
	}
	return c.attach.collect(ctx, list)
}

// Adopt implements Connector.
func (c *CNI) Adopt(id string) { c.attach.adopt(id) }

// IPs implements Connector.
func (c *CNI) IPs(id string) []netip.Addr { return c.attach.addressesOf(id) }

// Attached implements Connector.
func (c *CNI) Attached() []string { return c.attach.attached() }

// Ready implements Network.
func (c *CNI) Ready() error {
	c.mu.RLock()
	list, problem, status, stale := c.current, c.problem, c.status, c.stale
	c.mu.RUnlock()
	err := problem
	if err == nil {
		err = checkInstalled(list, c.cfg.BinDirs)
	}

	if err == nil {
		err = status
	}

	if c.isReloadNeeded(list, stale) {
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}

	return err
}

// isReloadNeeded reports whether another file may become the current one, because main plugins were
// installed or uninstalled.
func (c *CNI) isReloadNeeded(current *libcni.NetworkConfigList, stale []string) bool {
	installed := func(plugin string) bool { _, err := Find(plugin, c.cfg.BinDirs); return err == nil }
	if slices.ContainsFunc(stale, installed) {
		return true
	}
	if current == nil {
		return false
	}

	main := current.Plugins[0].Network.Type

	return !installed(main) && !slices.Contains(stale, main)
}

// Notice implements Network. It covers the watch and the unused files.
func (c *CNI) Notice() string {
	c.mu.RLock()
	defer c.mu.RUnlock()

	notices := make([]string, 0, len(c.broken)+2)
	for _, file := range c.broken[:min(len(c.broken), maxNoticed)] {
		notices = append(notices, "CNI configuration "+file)
	}

	for _, notice := range []string{c.attach.cache.notice(), c.watch.notice()} {
		if notice != "" {
			notices = append(notices, notice)
		}
	}

	return strings.Join(notices, "; ")
}

// SetPodCIDR implements Network. The ranges become the capability ipRanges.
func (c *CNI) SetPodCIDR(cidrs []netip.Prefix) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ranges = cidrs
	return nil
}

// Connector implements Network.
func (c *CNI) Connector() Connector { return c }

// Close implements Network.
func (c *CNI) Close() error { return c.watch.close() }
