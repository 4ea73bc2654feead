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

// Bounds of network configurations. Those of network add-ons are below 10 KiB and have some five
// plugins.
const (
	maxConfig      = 1 << 20 // bytes of one file, and of one cached configuration
	maxConfigFiles = 256
	maxPlugins     = 64

	// maxNetworkName and the ID, the interface and two dashes make the name of a file of the cache.
	maxNetworkName = unix.NAME_MAX - 64 - 15 - 2
)

// configFiles are the files of a directory that may hold a network configuration, in name order.
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

// firstUsable is the first valid configuration of a directory, in name order, whose main plugin is
// installed; stale files are those before it whose main plugin is not. Without any it is the first
// stale one: the plugin may be installed soon.
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
		return nil, fmt.Errorf("no valid CNI configuration among the %d files in %s (the last: %w); "+
			"pods on the host network run meanwhile", len(files), dir, last)
	}

	return nil, fmt.Errorf("no CNI configuration in %s: install a network add-on such as flannel; "+
		"pods on the host network run meanwhile", dir)
}

// staleError is a configuration whose main plugin is not installed.
type staleError struct {
	plugin string
	err    error
}

func (e *staleError) Error() string { return e.err.Error() }

func (e *staleError) Unwrap() error { return e.err }

// chained are standard plugins that change what others have made and give a pod no network of their
// own.
var chained = []string{"bandwidth", "firewall", "portmap", "sbr", "tuning", "vrf"}

// checkNetwork wants a configuration that gives pods more than lo.
func checkNetwork(list *libcni.NetworkConfigList) error {
	for _, p := range list.Plugins {
		if name := p.Network.Type; name != "loopback" && !slices.Contains(chained, name) {
			return nil
		}
	}
	return fmt.Errorf("network %s has only lo and gives pods no address: install a network add-on such as flannel",
		list.Name)
}

// readConfig reads a network configuration: a list of plugins from a file whose name ends in
// .conflist, else a single plugin.
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

// addPluginFiles adds the plugins that a list has in files of their own, below a directory named
// after the network (CNI specification 1.1, section 1, "loadOnlyInlinedPlugins").
func addPluginFiles(list *libcni.NetworkConfigList, dir string) error {
	if err := checkNetworkName(list.Name); err != nil {
		return err
	}

	files, err := libcni.ConfFiles(filepath.Join(dir, list.Name), []string{".conf"})
	if err != nil {
		return err
	}

	if len(files) > maxPlugins {
		return fmt.Errorf("it has %d files of plugins, at most %d are possible", len(files), maxPlugins)
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

// readConfigFile reads a regular file. Links are followed: the directory is the operator's.
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

// singlePlugin reads the configuration of one plugin as a list.
func singlePlugin(b []byte) (*libcni.NetworkConfigList, error) {
	conf, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, fmt.Errorf("%w; a file with a list of plugins must end in .conflist", err)
	}

	list, err := libcni.ConfListFromConf(conf)
	if err != nil {
		return nil, err
	}

	return list, checkList(list)
}

// checkList wants a name that libcni can join into a path, and plugins that can be programs' names.
func checkList(list *libcni.NetworkConfigList) error {
	if err := checkNetworkName(list.Name); err != nil {
		return err
	}

	if _, _, _, err := version.ParseVersion(list.CNIVersion); list.CNIVersion != "" && err != nil {
		return fmt.Errorf("cniVersion %q is no version", shown([]byte(list.CNIVersion)))
	}

	if len(list.Plugins) == 0 {
		return errors.New("it has no plugins")
	}
	if len(list.Plugins) > maxPlugins {
		return fmt.Errorf("it has %d plugins, at most %d are possible", len(list.Plugins), maxPlugins)
	}

	for i, p := range list.Plugins {
		for _, name := range []string{p.Network.Type, delegate(p)} {
			if strings.ContainsRune(name, '/') || len(name) > unix.NAME_MAX || !isClean(name) {
				return fmt.Errorf("plugins[%d]: type %q is no name of a program", i, shown([]byte(name)))
			}
		}
	}

	return nil
}

func checkNetworkName(name string) error {
	if err := utils.ValidateNetworkName(name); err != nil || len(name) > maxNetworkName {
		return fmt.Errorf("name %q is no name of a network: it must consist of at most %d letters, digits, '_', '.' and '-'",
			shown([]byte(name)), maxNetworkName)
	}
	return nil
}
