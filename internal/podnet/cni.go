package podnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/fsnotify/fsnotify"
)

// DefaultBinDirs are where plugins are looked for: the CNI convention, and Debian's package.
func DefaultBinDirs() []string { return []string{"/opt/cni/bin", "/usr/lib/cni"} }

// CNIConfig says where CNI's files are.
type CNIConfig struct {
	ConfDir  string   // of network configurations
	BinDirs  []string // of plugins
	CacheDir string   // of libcni
	Log      *slog.Logger
}

// CNI is the network that a configuration directory describes: the first valid file in name order, as it is now.
type CNI struct {
	cfg     CNIConfig
	attach  *attacher
	watcher *fsnotify.Watcher
	watched sync.WaitGroup

	mu      sync.RWMutex // guards the rest
	current *libcni.NetworkConfigList
	problem error // why there is no current configuration
	ranges  []netip.Prefix
}

var _ Network = (*CNI)(nil)

// NewCNI reads the configuration and watches it until Close. The directory may appear later.
func NewCNI(cfg CNIConfig) (*CNI, error) {
	attach, err := newAttacher(cfg.BinDirs, cfg.CacheDir)
	if err != nil {
		return nil, err
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", cfg.ConfDir, err)
	}
	c := &CNI{cfg: cfg, attach: attach, watcher: watcher}
	c.follow()
	c.watched.Go(func() {
		for {
			select {
			case _, ok := <-watcher.Events:
				if !ok {
					return
				}
				c.follow()
			case err, ok := <-watcher.Errors:
				if !ok {
					return
				}
				cfg.Log.Warn("watch the CNI configuration", "dir", cfg.ConfDir, "err", err)
			}
		}
	})
	return c, nil
}

// follow watches the directory, or the nearest folder above it that exists, and reads the configuration.
func (c *CNI) follow() {
	for dir := c.cfg.ConfDir; ; dir = filepath.Dir(dir) {
		if c.watcher.Add(dir) == nil || dir == filepath.Dir(dir) {
			if dir != c.cfg.ConfDir {
				// Between the look and the watch the folder may have come: look once more.
				if _, err := os.Stat(c.cfg.ConfDir); err == nil {
					_ = c.watcher.Add(c.cfg.ConfDir)
				}
			}
			break
		}
	}
	c.reload()
}

func (c *CNI) reload() {
	list, err := firstValid(c.cfg.ConfDir, func(file string, err error) {
		c.cfg.Log.Warn("CNI configuration is not valid, the next one is tried", "file", file, "err", err)
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if list != nil && (c.current == nil || string(c.current.Bytes) != string(list.Bytes)) {
		c.cfg.Log.Info("CNI configuration", "network", list.Name, "dir", c.cfg.ConfDir)
	}
	c.current, c.problem = list, err
}

// firstValid is the first valid configuration of a directory, in name order.
func firstValid(dir string, invalid func(file string, err error)) (*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("read CNI configurations: %w", err)
	}
	for _, f := range files {
		list, err := readConfig(f)
		if err == nil {
			return list, nil
		}
		invalid(f, err)
	}
	if len(files) > 0 {
		return nil, fmt.Errorf("no valid CNI configuration among the %d files in %s; pods on the host network run meanwhile", len(files), dir)
	}
	return nil, fmt.Errorf("no CNI configuration in %s: install a network add-on such as flannel; pods on the host network run meanwhile", dir)
}

func readConfig(file string) (*libcni.NetworkConfigList, error) {
	if strings.HasSuffix(file, ".conflist") {
		list, err := libcni.NetworkConfFromFile(file)
		if err == nil && len(list.Plugins) == 0 {
			err = errors.New("it has no plugins")
		}
		return list, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	if conf.Network.Type == "" {
		return nil, errors.New("it has no plugin type; a file with a list of plugins must end in .conflist")
	}
	return libcni.ConfListFromConf(conf)
}

// missing is an error that names the first plugin of a configuration that is in none of the directories.
func missing(list *libcni.NetworkConfigList, binDirs []string) error {
	for _, p := range list.Plugins {
		for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if name == "" {
				continue
			}
			if _, err := invoke.FindInPath(name, binDirs); err != nil {
				return fmt.Errorf("CNI plugin %q of network %s is not in %s: install it (the standard plugins are in the package containernetworking-plugins) or correct --cni-bin-dir",
					name, list.Name, strings.Join(binDirs, ", "))
			}
		}
	}
	return nil
}

func (c *CNI) config() (*libcni.NetworkConfigList, []netip.Prefix, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.current, c.ranges, c.problem
}

// Add implements Network.
func (c *CNI) Add(ctx context.Context, p Pod) ([]netip.Addr, error) {
	list, ranges, err := c.config()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	return c.attach.add(ctx, list, p, ranges)
}

// Del implements Network.
func (c *CNI) Del(ctx context.Context, p Pod) error {
	list, _, _ := c.config() // without one, the cache still knows what to do
	return c.attach.del(ctx, list, p)
}

// IPs implements Network.
func (c *CNI) IPs(id string) []netip.Addr { return c.attach.addressesOf(id) }

// Attached implements Network.
func (c *CNI) Attached() []string { return c.attach.attached() }

// Ready implements Network.
func (c *CNI) Ready() error {
	list, _, err := c.config()
	if err != nil {
		return err
	}
	return missing(list, c.cfg.BinDirs)
}

// SetPodCIDR implements Network: the ranges become the capability ipRanges.
func (c *CNI) SetPodCIDR(cidrs []netip.Prefix) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ranges = cidrs
	return nil
}

// Mode implements Network.
func (c *CNI) Mode() string { return "none" }

// Close implements Network.
func (c *CNI) Close() error {
	err := c.watcher.Close()
	c.watched.Wait()
	return err
}
