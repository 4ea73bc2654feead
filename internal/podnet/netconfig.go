package podnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// Limits of network configurations. Those of network add-ons are below 10 KiB and have about five
// plugins.
const (
	maxConfig      = 1 << 20 // bytes of a file and of a cached configuration
	maxConfigFiles = 256
	maxPlugins     = 64

	// A cache file's name consists of the network name, the ID, the interface and two dashes.
	maxNetworkName = unix.NAME_MAX - 64 - 15 - 2
)

// configFiles returns the configuration files of a directory in name order.
func configFiles(dir string) ([]string, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("read CNI configurations: %w", err)
	}

	if len(files) > maxConfigFiles {
		files = files[:maxConfigFiles]
	}

	return files, nil
}

// firstUsable returns the first valid configuration of a directory, in name order, with an
// installed main plugin. Otherwise it returns the first stale one (valid, but without its main
// plugin), since the plugin may be installed soon. It calls unused for each skipped file.
func firstUsable(dir string, binDirs []string, unused func(file string, err error)) (*libcni.NetworkConfigList, error) {
	files, err := configFiles(dir)
	if err != nil {
		return nil, err
	}

	var stale *libcni.NetworkConfigList
	var last error
	for _, f := range files {
		list, err := readConfig(f)
		if err == nil {
			err = checkNetwork(list)
		}

		if err != nil {
			last = err
			unused(f, err)
			continue
		}

		main := list.Plugins[0].Network.Type
		if _, err := Find(main, binDirs); err != nil {
			unused(f, &staleError{main, err})
			if stale == nil {
				stale = list
			}
			continue
		}

		return list, nil
	}

	switch {
	case stale != nil:
		return stale, nil
	case len(files) > 0:
		return nil, fmt.Errorf("no valid CNI configuration among the %d files in %s (last error: %w); "+
			"until then only pods on the host network can run", len(files), dir, last)
	}

	return nil, fmt.Errorf("no CNI configuration in %s: install a network add-on such as flannel; "+
		"until then only pods on the host network can run", dir)
}

// staleError reports a configuration with an uninstalled main plugin.
type staleError struct {
	plugin string
	err    error
}

func (e *staleError) Error() string { return e.err.Error() }

func (e *staleError) Unwrap() error { return e.err }

// chained lists standard plugins for modifying the network of other plugins. They connect no pod on
// their own.
var chained = []string{"bandwidth", "firewall", "portmap", "sbr", "tuning", "vrf"}

// checkNetwork requires a configuration with more than lo.
func checkNetwork(list *libcni.NetworkConfigList) error {
	for _, p := range list.Plugins {
		if name := p.Network.Type; name != "loopback" && !slices.Contains(chained, name) {
			return nil
		}
	}
	return fmt.Errorf("network %s has only lo and assigns no pod addresses: install a network add-on such as flannel",
		list.Name)
}

// readConfig reads a network configuration: a plugin list from a .conflist file, otherwise a single
// plugin.
func readConfig(file string) (*libcni.NetworkConfigList, error) {
	b, err := readConfigFile(file)
	if err != nil {
		return nil, boundError(err)
	}

	if !strings.HasSuffix(file, ".conflist") {
		list, err := singlePlugin(b)
		return list, boundError(err)
	}

	list, err := libcni.NetworkConfFromBytes(b)
	if err == nil && !list.LoadOnlyInlinedPlugins {
		err = addPluginFiles(list, filepath.Dir(file))
	}

	if err == nil {
		err = checkList(list)
	}

	if err != nil {
		return nil, boundError(err)
	}

	return list, nil
}

// addPluginFiles adds a list's plugins from separate files. These lie below a directory with the
// network's name (CNI specification 1.1, section 1, "loadOnlyInlinedPlugins").
func addPluginFiles(list *libcni.NetworkConfigList, dir string) error {
	if err := checkNetworkName(list.Name); err != nil {
		return err
	}

	files, err := libcni.ConfFiles(filepath.Join(dir, list.Name), []string{".conf"})
	if err != nil {
		return err
	}

	if len(files) > maxPlugins {
		return fmt.Errorf("%d plugin files exceed the limit of %d", len(files), maxPlugins)
	}

	for _, f := range files {
		b, err := readConfigFile(f)
		if err != nil {
			return err
		}

		conf, err := libcni.NetworkPluginConfFromBytes(b)
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}

		list.Plugins = append(list.Plugins, conf)
	}

	return nil
}

// readConfigFile reads a regular file. It follows links, since the directory belongs to the
// operator.
func readConfigFile(file string) ([]byte, error) {
	f, err := os.OpenFile(file, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) // a FIFO must not block
	if err != nil {
		return nil, err
	}
	defer f.Close()

	st, err := f.Stat()
	if err != nil {
		return nil, err
	}

	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", file)
	}

	return safefs.ReadAll(f, maxConfig)
}

// singlePlugin parses the configuration of one plugin as a list.
func singlePlugin(b []byte) (*libcni.NetworkConfigList, error) {
	conf, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, fmt.Errorf("%w; the name of a file with a plugin list must end in .conflist", err)
	}

	list, err := libcni.ConfListFromConf(conf) //nolint:staticcheck // older nodes have such files
	if err != nil {
		return nil, err
	}

	return list, checkList(list)
}

// checkList requires a network name safe in paths, and plugin types safe as program names.
func checkList(list *libcni.NetworkConfigList) error {
	if err := checkNetworkName(list.Name); err != nil {
		return err
	}

	if _, _, _, err := version.ParseVersion(list.CNIVersion); list.CNIVersion != "" && err != nil {
		return fmt.Errorf("cniVersion %q is not a valid version", excerpt([]byte(list.CNIVersion)))
	}

	if len(list.Plugins) == 0 {
		return errors.New("the list has no plugins")
	}
	if len(list.Plugins) > maxPlugins {
		return fmt.Errorf("%d plugins exceed the limit of %d", len(list.Plugins), maxPlugins)
	}

	for i, p := range list.Plugins {
		for _, name := range []string{p.Network.Type, ipamPlugin(p)} {
			if strings.ContainsRune(name, '/') || len(name) > unix.NAME_MAX || !isClean(name) {
				return fmt.Errorf("plugins[%d]: type %q is not a valid program name", i, excerpt([]byte(name)))
			}
		}
	}

	return nil
}

func checkNetworkName(name string) error {
	if err := utils.ValidateNetworkName(name); err != nil || len(name) > maxNetworkName {
		return fmt.Errorf("name %q is not a valid network name: use at most %d letters, digits, '_', '.' and '-'",
			excerpt([]byte(name)), maxNetworkName)
	}
	return nil
}
