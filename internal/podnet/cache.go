package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

const (
	// maxCacheFile bounds an entry of libcni's cache and a record of the journal, in bytes: the
	// configuration in base64, a result, and the annotations of a pod.
	maxCacheFile = 2*maxConfig + maxStdout + maxAnnotations
	// maxCacheFiles bounds the number of entries read; a node has some hundred pods.
	maxCacheFiles = 1 << 16
)

// cache reads libcni's cache. Other processes write to it, and a crash may leave torn files. libcni
// reads its files without a bound and blocks on a FIFO, so cache checks each file before libcni may
// read it, and sets invalid files aside.
type cache struct {
	dir string       // of libcni
	log *slog.Logger // nil for a reader that sets no files aside

	mu sync.Mutex // guards the fields below
	// pods with a file set aside; true if it was written after an ADD
	damaged map[model.ContainerID]bool
	aside   int // number of files set aside since the start
}

func newCache(dir string, log *slog.Logger) *cache {
	return &cache{dir: dir, log: log, damaged: map[model.ContainerID]bool{}}
}

func (c *cache) results() string { return filepath.Join(c.dir, "results") }

// entry is a checked file of libcni's cache. An entry without a configuration is a bare result from
// before libcni cached configurations.
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

	list    *libcni.NetworkConfigList // nil if the configuration is unusable
	result  *result                   // nil if the result is unusable
	written time.Time                 // modification time of the file
}

// runtime returns the plugins' parameters of the ADD.
func (e *entry) runtime() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID:    e.ContainerID,
		NetNS:          e.NetNS,
		IfName:         e.IfName,
		Args:           cleanArgs(e.Args),
		CapabilityArgs: e.Capabilities,
	}
}

// addresses returns the pod's addresses, nil if the cache has none.
func (e *entry) addresses() []netip.Addr {
	if e.result == nil {
		return nil
	}
	return e.result.addresses(isNetNS(e.NetNS))
}

// entries returns the entries of a container, or of all for "", in name order. Files without a
// usable configuration are set aside. An entry with an unusable result is set aside but returned,
// since its configuration can release the plugins' reservations.
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
			continue // removed concurrently
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

// readEntry reads and checks one file of the cache. With an error the entry is nil or partial.
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

// parseEntry parses the content b of the cache file name. The entry is nil for a bare result. With
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
		err = fmt.Errorf("it belongs to network %s", list.Name)
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

// checkName verifies that libcni derives exactly this file's path from the names in the entry.
func (e *entry) checkName(name string) error {
	if err := utils.ValidateNetworkName(e.Network); err != nil {
		return fmt.Errorf("networkName %q is not a valid network name", excerpt([]byte(e.Network)))
	}

	if err := utils.ValidateContainerID(e.ContainerID); err != nil {
		return fmt.Errorf("containerId %q is not a valid ID", excerpt([]byte(e.ContainerID)))
	}

	if err := utils.ValidateInterfaceName(e.IfName); err != nil {
		return fmt.Errorf("ifName %q is not a valid interface name", excerpt([]byte(e.IfName)))
	}

	if want := e.Network + "-" + e.ContainerID + "-" + e.IfName; name != want {
		return fmt.Errorf("the file has the entry of %s", excerpt([]byte(want)))
	}
	if !isClean(e.NetNS) {
		return errors.New("netns is not a valid path")
	}

	return nil
}

// checkLoneResult accepts the format of libcni before it cached configurations (0.8): a result with
// an address. Anything else is a leftover of a crash.
func checkLoneResult(b []byte) error {
	r, err := parseResult(b)
	if err != nil {
		return err
	}

	if len(r.IPs) == 0 && r.IP4 == nil && r.IP6 == nil {
		return errors.New("neither an entry nor a result")
	}

	return nil
}

// restore writes the entry of an attachment.
func (c *cache) restore(a attachment) error {
	b, err := entryOf(a)
	if err == nil {
		err = c.write(a.list.Name+"-"+a.rt.ContainerID+"-"+a.rt.IfName, b)
	}

	if err != nil {
		return fmt.Errorf("record the attachment: %w", err)
	}

	return nil
}

// write writes a temporary file and renames it, so that the entry is complete or absent.
func (c *cache) write(name string, b []byte) error {
	if err := os.MkdirAll(c.results(), 0o700); err != nil {
		return err
	}
	return safefs.WriteFile(filepath.Join(c.results(), name), filepath.Join(c.dir, newRecord), b, nil)
}

// restoreEntry writes a missing entry again, with its old time.
func (c *cache) restoreEntry(name string, e *entry) {
	file := filepath.Join(c.results(), name)
	if _, err := os.Lstat(file); err == nil {
		return
	}
	if b, err := json.Marshal(e); err == nil && c.write(name, b) == nil {
		_ = os.Chtimes(file, e.written, e.written)
	}
}

func (c *cache) remove(name string) { _ = os.Remove(filepath.Join(c.results(), name)) }

// cleanArgs removes CNI_ARGS with ambiguous separators (CNI conventions: KEY=VALUE;KEY=VALUE).
func cleanArgs(args [][2]string) [][2]string {
	return slices.DeleteFunc(slices.Clone(args), func(a [2]string) bool {
		return strings.ContainsAny(a[0]+a[1], ";=") || !isClean(a[0]) || !isClean(a[1])
	})
}
