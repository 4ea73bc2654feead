package podnet

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Pins keeps network namespaces alive by bind mounts, without a process, so that a pod can be
// disconnected properly after its pause process has exited. The mounts outlive the daemon.
//
// The pins of sandboxes lie in the directory used by network add-ons and other runtimes. Their
// names have the usual form and are derived from the sandbox ID (see pinName). Our own directory of
// records has a link for each pin, named by the ID. It also holds namespaces without a sandbox and,
// until Prepare, pins of earlier versions. Pins leaves other files in both directories alone.
type Pins struct {
	dir     string // of sandboxes' pins
	records string
	next    string // prefix of the links that this process writes

	mu      sync.Mutex      // guards created
	created map[string]bool // names of namespaces between Create and Drop
}

// NewPins returns Pins in dir, shared with other runtimes, with its own directory of records. Both
// directories are created on demand.
func NewPins(dir, records string) *Pins {
	return &Pins{
		dir:     dir,
		records: records,
		next:    newRecord + rand.Text() + "-",
		created: map[string]bool{},
	}
}

// maxPins bounds the number of names read from the directory.
const maxPins = 1 << 16

// pinName returns the name of a sandbox's pin: "cni-" and a UUID (RFC 9562, version 8). Network
// add-ons expect this form, which containerd and CRI-O use.
func pinName(id model.ContainerID) string {
	b := sha256.Sum256([]byte("cri-dockerd network namespace of sandbox " + id))
	b[6] = b[6]&0x0f | 0x80
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("cni-%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

var pinNames = regexp.MustCompile(`^cni-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// isPinName reports whether a name has the form of a pin, ours or of another runtime.
func isPinName(name string) bool { return pinNames.MatchString(name) }

// Pin pins the network namespace of a sandbox's process and returns the pin's path. It is
// idempotent. It returns NotFound if the process is not the sandbox's.
func (p *Pins) Pin(id model.ContainerID, pid int) (string, error) {
	if path := p.Path(id); path != "" {
		return path, nil
	}

	ns, err := OpenProcess(id, pid)
	if err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	defer ns.Close()

	return p.pin(id, ns)
}

// Keep pins a namespace of Create for its sandbox, before or after the sandbox joins, and returns
// the pin's path.
func (p *Pins) Keep(id model.ContainerID, path string) (string, error) {
	if path := p.Path(id); path != "" {
		return path, nil
	}

	if id == "" || filepath.Dir(path) != filepath.Clean(p.records) || !isNewName(filepath.Base(path)) {
		return "", fmt.Errorf("pin network namespace: %q is not one of our namespaces: %w", path,
			errdefs.ErrInvalidArgument)
	}

	ns, err := openNetNS(path)
	if err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	defer ns.Close()

	return p.pin(id, ns)
}

// pin pins an open namespace for a sandbox. It writes the record first: after a crash, a pin
// without a record would have no owner.
func (p *Pins) pin(id model.ContainerID, ns *os.File) (path string, err error) {
	if err := p.record(id); err != nil {
		return "", err
	}

	dir, err := openShared(p.dir)
	if err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	defer dir.Close()

	return filepath.Join(p.dir, pinName(id)), mountIn(dir, ns, pinName(id))
}

// record records the pin of a sandbox. It replaces the unmounted pin of an earlier version.
func (p *Pins) record(id model.ContainerID) error {
	dir, err := p.openRecords(true)
	if err != nil {
		return fmt.Errorf("record network namespace: %w", err)
	}
	defer dir.Close()

	next := p.next + string(id)
	err = unix.Unlinkat(int(dir.Fd()), next, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		err = unix.Symlinkat(filepath.Join(p.dir, pinName(id)), int(dir.Fd()), next)
	}

	if err == nil {
		err = unix.Renameat(int(dir.Fd()), next, int(dir.Fd()), string(id))
	}

	if err != nil {
		return fmt.Errorf("record network namespace of sandbox %s: %w", id, err)
	}

	return nil
}

// openRecords opens the directory of records. If create is true, it creates a missing directory.
func (p *Pins) openRecords(create bool) (*os.File, error) {
	if create {
		if err := os.MkdirAll(p.records, 0o700); err != nil {
			return nil, err
		}
	}

	f, err := openDirectory(p.records)
	if err == nil && create {
		err = f.Chmod(0o700) // earlier versions used 0755
	}

	return f, err
}

// openShared opens the directory of pins. It creates a missing directory.
func openShared(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o755); err != nil { // the mode of ip-netns(8)
		return nil, err
	}
	return openDirectory(path)
}

func openDirectory(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// mountIn creates a file in a directory and mounts an open namespace on it.
func mountIn(dir, ns *os.File, name string) error {
	path := filepath.Join(dir.Name(), name)
	// Nothing is pinned under this name, so a file is a leftover of a crash or of another program.
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("pin network namespace: remove %s: %w", path, err)
	}

	f, err := safefs.OpenAt(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY, 0o400)
	if err != nil {
		return fmt.Errorf("pin network namespace: %w", err)
	}
	defer f.Close()

	if err := unix.Mount(fdPath(ns), fdPath(f), "", unix.MS_BIND, ""); err != nil {
		err = fmt.Errorf("pin network namespace %s: %w", ns.Name(), err)
		return errors.Join(err, unix.Unlinkat(int(dir.Fd()), name, 0))
	}

	return nil
}

// fdPath returns the path of an open file, for system calls without descriptor arguments.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// names returns the file names in the directory of records, none if it does not exist.
func (p *Pins) names() []string {
	dir, err := p.openRecords(false)
	if err != nil {
		return nil
	}
	defer dir.Close()

	names, err := dir.Readdirnames(maxPins)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}

	return names
}

// Joined reports whether a process belongs to the sandbox and runs in its pinned network namespace.
func (p *Pins) Joined(id model.ContainerID, pid int) bool {
	path := p.Path(id)
	if path == "" {
		return false
	}

	pin, err := openNetNS(path)
	if err != nil {
		return false
	}
	defer pin.Close()

	ns, err := OpenProcess(id, pid)
	if err != nil {
		return false
	}
	defer ns.Close()

	var pinned, joined unix.Stat_t
	if unix.Fstat(int(pin.Fd()), &pinned) != nil || unix.Fstat(int(ns.Fd()), &joined) != nil {
		return false
	}

	return pinned.Dev == joined.Dev && pinned.Ino == joined.Ino
}

// OpenPin opens a sandbox's pin. It returns NotFound if nothing is pinned.
func (p *Pins) OpenPin(id model.ContainerID) (*os.File, error) {
	path := p.Path(id)
	if path == "" {
		return nil, fmt.Errorf("network namespace of sandbox %s is not pinned: %w", id, errdefs.ErrNotFound)
	}
	return openNetNS(path)
}

// Path returns the pin's path, "" if nothing is pinned.
func (p *Pins) Path(id model.ContainerID) string {
	switch {
	case id == "":
		return ""
	case isPinnedIn(p.dir, pinName(id)):
		return filepath.Join(p.dir, pinName(id))
	case isPinnedIn(p.records, string(id)): // of an earlier version
		return filepath.Join(p.records, string(id))
	}

	return ""
}

// isPinnedIn reports whether a namespace is mounted on a name in the directory at path.
func isPinnedIn(path, name string) bool {
	dir, err := openDirectory(path)
	if err != nil {
		return false
	}
	defer dir.Close()
	return isPinned(dir, name)
}

// isPinned reports whether a namespace is mounted on a name in dir. It does not follow links.
func isPinned(dir *os.File, name string) bool {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return isNamespaceFile(fd)
}

// Addresses returns the addresses of a pod's interface in the namespace of its pause process. It
// returns nil if there are none or the process is not the sandbox's.
func (p *Pins) Addresses(id model.ContainerID, pid int) []netip.Addr { return Addresses(id, pid) }

// Unpin removes a sandbox's pin, and the record last. It is idempotent.
func (p *Pins) Unpin(id model.ContainerID) error {
	if id == "" {
		return nil
	}
	if err := unmountIn(p.dir, pinName(id)); err != nil {
		return err
	}
	return unmountIn(p.records, string(id))
}

// unmountIn undoes mountIn. It unmounts namespaces only, does not follow links, and removes the
// file.
func unmountIn(path, name string) error {
	dir, err := openDirectory(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	defer dir.Close()

	if err := unmountAll(dir, name); err != nil {
		return err
	}

	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin network namespace %s: %w", filepath.Join(path, name), err)
	}

	return nil
}

// unmountAll unmounts the namespaces on a name. A crash may have mounted it twice.
func unmountAll(dir *os.File, name string) error {
	file := fdPath(dir) + "/" + name
	for isPinned(dir, name) {
		if err := unix.Unmount(file, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unpin network namespace %s: %w", filepath.Join(dir.Name(), name), err)
		}
	}
	return nil
}

// List returns the sandboxes with a pin or the leftover of one.
func (p *Pins) List() []model.ContainerID {
	var ids []model.ContainerID
	for _, name := range p.names() {
		if id, err := model.ParseContainerID(name); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}
