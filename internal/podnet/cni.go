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

// DefaultBinDirs are where plugins are looked for: the CNI convention, and Debian's package.
func DefaultBinDirs() []string { return []string{"/opt/cni/bin", "/usr/lib/cni"} }

// CNIConfig says where CNI's files are.
type CNIConfig struct {
	ConfDir  string   // of network configurations
	BinDirs  []string // of plugins
	CacheDir string   // of libcni
	// say the addresses of pods whose entry in the cache is damaged; nil for none
	Pins     *Pins
	Observer *Observer // nil for none
	Log      *slog.Logger
}

// CNI is the network that a configuration directory describes: the first valid file in name order,
// as it is now.
type CNI struct {
	cfg    CNIConfig
	attach *attacher
	watch  *confWatch

	// one look at the configuration at a time, so that an older one never follows a newer one
	reading keylock.Map
	unused  map[string]string // why which file is not used; under reading
	changed chan struct{}     // holds one element when plugins were installed or uninstalled

	mu      sync.RWMutex // guards the rest
	current *libcni.NetworkConfigList
	problem error    // why there is no current configuration
	status  error    // what the plugins said when they were last asked
	broken  []string // files that are not valid, and what is wrong with stale ones
	stale   []string // the main plugins of files that are not used without them
	ranges  []netip.Prefix
}

// maxNoticed bounds how many files a notice names.
const maxNoticed = 5

var _ Network = (*CNI)(nil)

// How often plugins of version 1.1 or newer are asked for their STATUS, while they are ready and
// while they are not.
const (
	statusEvery = 10 * time.Second
	statusAgain = time.Second
)

var errNotAsked = errors.New("its plugins have not been asked yet")

// NewCNI reads the configuration, which may appear later. Run follows it.
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
	c.reloadLocked(func(*libcni.NetworkConfigList) error { return errNotAsked })

	return c, nil
}

// Run implements Network: it follows the configuration directory, and the plugins' own word, and
// has plugins that are back release what they hold of pods that are gone.
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
			c.cfg.Log.Warn("watch the CNI configuration", "dir", c.cfg.ConfDir, "err", err)

		case <-ask.C:
		case <-c.changed:
		}

		c.watch.update()
		next := statusEvery
		if c.watch.notice() != "" {
			next = pollEvery
		}
		if !c.reload(ctx, status) {
			next = statusAgain
		}

		ask.Reset(next)
	}
}

// Reload reads the configuration again, and asks its plugins, although nothing has told of a
// change.
func (c *CNI) Reload(ctx context.Context) {
	c.watch.update()
	c.reload(ctx, func(list *libcni.NetworkConfigList) error { return c.attach.status(ctx, list) })
}

// reload reads the configuration and what its plugins say of themselves, which it returns as ready
// or not.
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
		if unused[file] = err.Error(); c.unused[file] != err.Error() { // it is read every few seconds
			c.cfg.Log.Warn("CNI configuration cannot be used, the next one is tried", "file", file, "err", err)
		}

		var noPlugin *staleError
		if errors.As(err, &noPlugin) {
			stale = append(stale, noPlugin.plugin)
			broken = append(broken, fmt.Sprintf("%s is not used: %v", file, err))
		} else {
			broken = append(broken, file+" is not valid and not used")
		}
	})

	c.unused = unused
	var said error
	if list != nil && hasGC(list) {
		said = status(list)
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	if list != nil && (c.current == nil || string(c.current.Bytes) != string(list.Bytes)) {
		c.cfg.Log.Info("CNI configuration", "network", list.Name, "dir", c.cfg.ConfDir)
	}
	if said != nil && !errors.Is(said, errNotAsked) && (c.status == nil || c.status.Error() != said.Error()) {
		c.cfg.Log.Warn("CNI plugins are not ready", "err", said)
	}

	c.current, c.problem, c.status = list, err, said
	c.broken, c.stale = broken, stale

	return said == nil
}

// ConfFile is a network configuration as Inspect finds it.
type ConfFile struct {
	File    string
	Network string   // its name
	Plugins []string // the programs that it needs, in order, those for addresses among them
	Err     error    // why it is not valid
}

// Inspect reads all configurations of a directory as NewCNI does, in name order; the first valid
// one counts. A file for which allowed returns an error is not read.
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
			c.Network, c.Plugins = list.Name, programs(list)
		}

		all = append(all, c)
	}

	return all, nil
}

// Find is where a plugin is, or an error if it is in none of the directories.
func Find(name string, binDirs []string) (string, error) {
	return (*plugins)(nil).FindInPath(name, binDirs)
}

// programs are the plugins that a configuration needs.
func programs(list *libcni.NetworkConfigList) []string {
	var all []string
	for _, p := range list.Plugins {
		for _, name := range []string{p.Network.Type, delegate(p)} {
			if name != "" && !slices.Contains(all, name) {
				all = append(all, name)
			}
		}
	}

	return all
}

// missing is an error that names the first plugin of a configuration that is in none of the
// directories.
func missing(list *libcni.NetworkConfigList, binDirs []string) error {
	for _, name := range programs(list) {
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
	list, _, _ := c.config() // without one, the cache still knows what to do
	return c.attach.del(ctx, list, p)
}

// Check implements Connector.
func (c *CNI) Check(ctx context.Context, p Pod) error { return c.attach.check(ctx, p) }

// Collect implements Connector.
func (c *CNI) Collect(ctx context.Context) error {
	list, _, err := c.config()
	if err != nil {
		return nil // there is nothing to ask
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
		err = missing(list, c.cfg.BinDirs)
	}

	if err == nil {
		err = status
	}

	if c.otherFile(list, stale) {
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}

	return err
}

// otherFile says whether another file than the current one may have to be used, since main plugins
// were installed or uninstalled.
func (c *CNI) otherFile(current *libcni.NetworkConfigList, stale []string) bool {
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

// Notice implements Network: the watch, and files that are not used although they are there.
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

// SetPodCIDR implements Network: the ranges become the capability ipRanges.
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
