package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

const (
	// maxCacheFile bounds an entry of libcni's cache and a record of the journal, in bytes: the
	// configuration in base64, a result, and the annotations of a pod.
	maxCacheFile = 2*maxConfig + maxStdout + maxAnnotations
	// maxCacheFiles bounds how many entries are read; a node has some hundred pods.
	maxCacheFiles = 1 << 16
	// setAsideDir holds, below the cache's directory, files that could not be used. It is never
	// read.
	setAsideDir = "set-aside"
)

// cache reads libcni's cache, which other processes write and a crash may leave torn. libcni itself
// reads its files without a bound and waits for a FIFO, so each file is checked here before libcni
// may read it; one that fails is set aside.
type cache struct {
	dir string       // of libcni
	log *slog.Logger // nil for a reader that leaves every file where it is

	mu sync.Mutex // guards the rest
	// pods of which a file was set aside; true if it was written after an ADD
	damaged map[model.ContainerID]bool
	aside   int // files set aside since the start
}

func newCache(dir string, log *slog.Logger) *cache {
	return &cache{dir: dir, log: log, damaged: map[model.ContainerID]bool{}}
}

func (c *cache) results() string { return filepath.Join(c.dir, "results") }

// entry is a file of libcni's cache, checked. One without a configuration is a result alone, from
// before libcni kept configurations.
type entry struct {
	Kind         string          `json:"kind"`
	ContainerID  string          `json:"containerId"`
	Config       []byte          `json:"config"`
	IfName       string          `json:"ifName"`
	Network      string          `json:"networkName"`
	NetNS        string          `json:"netns"`
	Args         [][2]string     `json:"cniArgs"`
	Capabilities map[string]any  `json:"capabilityArgs"`
	Result       json.RawMessage `json:"result,omitempty"`

	list    *libcni.NetworkConfigList // nil if the configuration cannot be used
	result  *result                   // nil if the result cannot be used
	written time.Time                 // when the file was written
}

// runtime is how the plugins were called.
func (e *entry) runtime() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID:    e.ContainerID,
		NetNS:          e.NetNS,
		IfName:         e.IfName,
		Args:           cleanArgs(e.Args),
		CapabilityArgs: e.Capabilities,
	}
}

// addresses are those of the pod, nil if the cache does not know them.
func (e *entry) addresses() []netip.Addr {
	if e.result == nil {
		return nil
	}
	return e.result.addresses(isNetNS(e.NetNS))
}

// entries are the entries with a configuration of a container, or all for "", in the order of their
// names. Files that cannot be used are set aside. An entry whose result alone cannot be used is set
// aside and returned, since its configuration releases what plugins have reserved.
func (c *cache) entries(id string) ([]*entry, error) {
	dir, err := safefs.OpenDir(c.results())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the CNI cache: %w", err)
	}
	defer dir.Close()

	names, err := dir.Readdirnames(maxCacheFiles)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the CNI cache: %w", err)
	}

	slices.Sort(names)

	var all []*entry
	for _, name := range names {
		if id != "" && !strings.Contains(name, "-"+id+"-") {
			continue
		}

		e, err := readEntry(dir, name)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}

		if err != nil && c.log != nil && c.isOurs(dir, name) {
			_ = c.setAside(c.results(), name, err)
		}

		if e != nil && (e.list != nil || c.log == nil) && (id == "" || e.ContainerID == id) {
			all = append(all, e)
		}
	}

	return all, nil
}

// readEntry reads and checks one file of the cache. With an error the entry is nil or a part.
func readEntry(dir *os.File, name string) (*entry, error) {
	f, err := safefs.OpenRegular(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	st, err := f.Stat()
	if err != nil {
		return nil, err
	}

	b, err := safefs.ReadAll(f, maxCacheFile)
	if err != nil {
		return nil, err
	}

	e, err := parseEntry(name, b)
	if e != nil {
		e.written = st.ModTime()
	}

	return e, err
}

// parseEntry parses what the cache has in the file name. The entry is nil for a result alone. With
// an error it is nil, or lacks its configuration or its result.
func parseEntry(name string, b []byte) (*entry, error) {
	e := &entry{}
	if err := json.Unmarshal(b, e); err != nil {
		return nil, boundError(err)
	}

	if e.Kind != libcni.CNICacheV1 {
		return nil, checkLoneResult(b)
	}
	if err := e.checkName(name); err != nil {
		return nil, err
	}

	list, err := listFromBytes(e.Config)
	if err == nil && list.Name != e.Network {
		err = fmt.Errorf("it is of network %s", list.Name)
	}

	if err != nil {
		return e, fmt.Errorf("the cached configuration of network %s: %w", e.Network, boundError(err))
	}

	e.list = list
	r, err := parseResult(e.Result)
	if err != nil {
		return e, fmt.Errorf("the cached result of network %s: %w", e.Network, err)
	}

	e.result = r

	return e, nil
}

// checkName wants names that libcni joins into no other path than that of this file.
func (e *entry) checkName(name string) error {
	if err := utils.ValidateNetworkName(e.Network); err != nil {
		return fmt.Errorf("networkName %q is no name of a network", shown([]byte(e.Network)))
	}

	if err := utils.ValidateContainerID(e.ContainerID); err != nil {
		return fmt.Errorf("containerId %q is no ID", shown([]byte(e.ContainerID)))
	}

	if err := utils.ValidateInterfaceName(e.IfName); err != nil {
		return fmt.Errorf("ifName %q is no name of an interface", shown([]byte(e.IfName)))
	}

	if want := e.Network + "-" + e.ContainerID + "-" + e.IfName; name != want {
		return fmt.Errorf("it is the entry of %s", shown([]byte(want)))
	}
	if !isClean(e.NetNS) {
		return errors.New("netns is no path")
	}

	return nil
}

// checkLoneResult wants what libcni kept before it knew configurations (0.8): a result, which has
// an address. Anything else is what a crash left.
func checkLoneResult(b []byte) error {
	r, err := parseResult(b)
	if err != nil {
		return err
	}

	if len(r.IPs) == 0 && r.IP4 == nil && r.IP6 == nil {
		return errors.New("it is neither an entry nor a result")
	}

	return nil
}

// isOurs says whether a name of the cache may be moved: any file, and a directory in the place of
// an entry of ours.
func (*cache) isOurs(dir *os.File, name string) bool {
	_, ok := podOf(name)
	return ok || !isDirectory(dir, name)
}

// clearWay sets aside what lies in the place of a directory of the cache and is none.
func (c *cache) clearWay(name string) error {
	dir, err := safefs.OpenDir(filepath.Join(c.dir, name))
	switch {
	case err == nil:
		return dir.Close()
	case errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, unix.ENOTDIR) && !isLink(filepath.Join(c.dir, name)):
		return c.setAside(c.dir, name, err)
	}

	return fmt.Errorf("read the CNI cache: %w", err)
}

func isLink(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode()&os.ModeSymlink != 0
}

// restore writes the entry of an attachment.
func (c *cache) restore(a attachment) error {
	b, err := entryOf(a)
	if err == nil {
		err = c.write(a.list.Name+"-"+a.rt.ContainerID+"-"+a.rt.IfName, b)
	}

	if err != nil {
		return fmt.Errorf("note what CNI plugins hold: %w", err)
	}

	return nil
}

// write writes a file aside and renames it, so that it is whole or not there.
func (c *cache) write(name string, b []byte) error {
	if err := os.MkdirAll(c.results(), 0o700); err != nil {
		return err
	}
	return safefs.WriteFile(filepath.Join(c.results(), name), filepath.Join(c.dir, newRecord), b, nil)
}

// keep writes an entry again if it is gone, with its old time.
func (c *cache) keep(name string, e *entry) {
	file := filepath.Join(c.results(), name)
	if _, err := os.Lstat(file); err == nil {
		return
	}
	if b, err := json.Marshal(e); err == nil && c.write(name, b) == nil {
		_ = os.Chtimes(file, e.written, e.written)
	}
}

func (c *cache) remove(name string) { _ = os.Remove(filepath.Join(c.results(), name)) }

func isDirectory(dir *os.File, name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// setAside moves a file out of a directory that is read, and logs why. The pod of the file is
// released with the current configuration.
func (c *cache) setAside(dir, name string, why error) error {
	file, target := filepath.Join(dir, name), filepath.Join(c.dir, setAsideDir, name)
	err := os.MkdirAll(filepath.Dir(target), 0o700)
	if err == nil {
		err = os.Rename(file, target)
	}

	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOTDIR) ||
		errors.Is(err, unix.EISDIR) {
		// What was set aside earlier under that name is of another kind.
		err = os.RemoveAll(target)
		if err == nil {
			err = os.Rename(file, target)
		}
	}

	if err != nil {
		c.log.Error("a file of the CNI cache cannot be used and cannot be set aside",
			"file", file, "problem", boundError(why), "err", err)
		return errors.Join(boundError(why), err)
	}

	c.log.Warn("a file of the CNI cache could not be used and is set aside",
		"file", file, "to", target, "problem", boundError(why))

	c.mu.Lock()
	defer c.mu.Unlock()

	c.aside++
	c.noteLocked(name)

	return nil
}

// noteLocked notes whose file was set aside. Records of the journal have the ID alone as their
// name.
func (c *cache) noteLocked(name string) {
	if id, ok := podOf(name); ok {
		c.damaged[id] = c.damaged[id] || name != string(id)
	}
}

// podOf finds the container ID in the name of a cache's entry of ours or of a record.
func podOf(name string) (model.ContainerID, bool) {
	name = strings.TrimSuffix(name, "-"+ifName)
	if i := len(name) - 64; i == 0 || i > 0 && name[i-1] == '-' {
		id, err := model.ParseContainerID(name[i:])
		return id, err == nil
	}
	return "", false
}

// isDamaged says whether a file of a pod was set aside.
func (c *cache) isDamaged(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.damaged[model.ContainerID(id)]
	return ok
}

// damagedPods are the pods of which a file was set aside, also by an earlier process; true if the
// pod had been connected.
func (c *cache) damagedPods() map[model.ContainerID]bool {
	var names []string
	if dir, err := os.Open(filepath.Join(c.dir, setAsideDir)); err == nil {
		names, _ = dir.Readdirnames(maxCacheFiles)
		dir.Close()
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	for _, name := range names {
		c.noteLocked(name)
	}

	return maps.Clone(c.damaged)
}

// forget removes what was set aside of a pod whose network is released.
func (c *cache) forget(id string) {
	if !c.isDamaged(id) {
		return
	}

	dir := filepath.Join(c.dir, setAsideDir)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if of, ok := podOf(e.Name()); ok && string(of) == id {
			_ = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	delete(c.damaged, model.ContainerID(id))
}

// notice is what an operator should know of files that were set aside, "" for nothing.
func (c *cache) notice() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aside == 0 {
		return ""
	}
	return fmt.Sprintf("%d files of the CNI cache could not be used and were moved to %s; the log says why",
		c.aside, filepath.Join(c.dir, setAsideDir))
}

// cleanArgs are the CNI_ARGS that cannot be taken for others (CNI conventions:
// KEY=VALUE;KEY=VALUE).
func cleanArgs(args [][2]string) [][2]string {
	return slices.DeleteFunc(slices.Clone(args), func(a [2]string) bool {
		return strings.ContainsAny(a[0]+a[1], ";=") || !isClean(a[0]) || !isClean(a[1])
	})
}
