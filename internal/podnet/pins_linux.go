package podnet

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Pins keeps network namespaces alive without a process, by bind mounts, so that a pod can be
// disconnected properly when its pause process is gone. The mounts outlive the daemon.
//
// A sandbox's pin lies where network add-ons look for it, beside those of other runtimes, under a
// name of their form that is derived from the sandbox's ID (see pinName). For each pin the
// directory of records, which is ours alone, has a link with the ID as its name. There are also the
// namespaces that have no sandbox yet, and until Prepare the pins of earlier versions. Other files
// in either directory are left alone.
type Pins struct {
	dir     string // of sandboxes' pins
	records string

	mu   sync.Mutex      // guards made
	made map[string]bool // the names of namespaces that Make has made and nobody has dropped
}

// NewPins pins in dir, which is shared with other runtimes, and keeps its records in another
// directory. Both are made when they are needed.
func NewPins(dir, records string) *Pins {
	return &Pins{
		dir:     dir,
		records: records,
		made:    map[string]bool{},
	}
}

// maxPins bounds how many names of the directory are read.
const maxPins = 1 << 16

// newMark begins the names of namespaces that have no sandbox yet; 16 hexadecimal digits follow.
const newMark = "new-"

// isNewName says whether a file of the directory may be one of Make.
func isNewName(name string) bool {
	digits, ok := strings.CutPrefix(name, newMark)
	b, err := hex.DecodeString(digits)
	return ok && err == nil && len(b) == 8
}

// pinName is the name of a sandbox's pin: "cni-" and a UUID (RFC 9562, version 8), as containerd
// and CRI-O have it, which network add-ons expect.
func pinName(id model.ContainerID) string {
	b := sha256.Sum256([]byte("cri-dockerd network namespace of sandbox " + id))
	b[6] = b[6]&0x0f | 0x80
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("cni-%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

var pinNames = regexp.MustCompile(`^cni-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// isPinName says whether a name has the form of a pin's, of ours or of another runtime.
func isPinName(name string) bool { return pinNames.MatchString(name) }

// Pin pins the network namespace of a sandbox's process and returns the pin's path. Pinning again
// is no error. NotFound if the process is not the sandbox's.
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

// Keep pins a namespace of Make for the sandbox that has joined it, or is to, and returns the pin's
// path.
func (p *Pins) Keep(id model.ContainerID, made string) (string, error) {
	if path := p.Path(id); path != "" {
		return path, nil
	}

	if id == "" || filepath.Dir(made) != filepath.Clean(p.records) || !isNewName(filepath.Base(made)) {
		return "", fmt.Errorf("pin network namespace: %q is not a namespace of ours: %w", made,
			errdefs.ErrInvalidArgument)
	}

	ns, err := openNetNS(made)
	if err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	defer ns.Close()

	return p.pin(id, ns)
}

// pin pins an open namespace for a sandbox. The record comes first: a pin without one would be
// nobody's after a crash.
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

// record notes that a sandbox has a pin. What earlier versions mounted in its place is gone
// already.
func (p *Pins) record(id model.ContainerID) error {
	dir, err := p.openRecords(true)
	if err != nil {
		return fmt.Errorf("record network namespace: %w", err)
	}
	defer dir.Close()

	next := ".new-" + string(id)
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

// openRecords opens the directory of records, and makes it first if it is not there and create is
// true.
func (p *Pins) openRecords(create bool) (*os.File, error) {
	if create {
		if err := os.MkdirAll(p.records, 0o700); err != nil {
			return nil, err
		}
	}

	f, err := openDirectory(p.records)
	if err == nil && create {
		err = f.Chmod(0o700) // earlier versions made it for everybody
	}

	return f, err
}

// openShared opens the directory of pins, and makes it first if it is not there.
func openShared(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o755); err != nil { // as ip-netns(8) makes it
		return nil, err
	}
	return openDirectory(path)
}

func openDirectory(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// mountIn mounts an open namespace on a file of a directory, which is made.
func mountIn(dir, ns *os.File, name string) error {
	path := filepath.Join(dir.Name(), name)
	// Nothing is pinned there: whatever it is, a crash or somebody else has left it.
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

// fdPath is a path of an open file for calls that take no descriptor.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// Make makes a network namespace with lo up, Docker's defaults and these sysctls
// ("net.core.somaxconn"), and returns the path where it is pinned until Drop. InvalidArgument for a
// sysctl that cannot be set.
func (p *Pins) Make(sysctls map[string]string) (path string, err error) {
	parsed, err := parseSysctls(sysctls)
	if err != nil {
		return "", fmt.Errorf("make network namespace: %w", err)
	}

	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	name := newMark + hex.EncodeToString(b)
	p.mu.Lock()
	p.made[name] = true
	p.mu.Unlock()

	path = filepath.Join(p.records, name)
	leave := func() error { return os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET)) }
	err = awayFromHome(leave, func() error {
		if err := setLoopbackUp(); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}

		if err := writeSysctls(parsed); err != nil {
			return err
		}

		ns, err := openNetNS(threadNetNS)
		if err != nil {
			return err
		}
		defer ns.Close()

		dir, err := p.openRecords(true)
		if err != nil {
			return err
		}
		defer dir.Close()

		return mountIn(dir, ns, name)
	})
	if err != nil {
		return "", errors.Join(fmt.Errorf("make network namespace: %w", err), p.Drop(path))
	}

	return path, nil
}

// Drop gives up a path of Make. The namespace lives on where it is kept, and with the processes in
// it.
func (p *Pins) Drop(path string) error {
	name := filepath.Base(path)
	if filepath.Dir(path) != filepath.Clean(p.records) || !isNewName(name) {
		return fmt.Errorf("unpin network namespace: %q is not a namespace of ours: %w", path,
			errdefs.ErrInvalidArgument)
	}

	err := unmountIn(p.records, name)
	p.mu.Lock()
	defer p.mu.Unlock()

	delete(p.made, name)

	return err
}

// Sweep gives up what earlier processes made and never dropped.
func (p *Pins) Sweep() error {
	var errs []error
	for _, name := range p.names() {
		p.mu.Lock()
		ours := p.made[name]
		p.mu.Unlock()
		if isNewName(name) && !ours {
			errs = append(errs, unmountIn(p.records, name))
		}
	}

	return errors.Join(errs...)
}

// names are the names of the directory of records, none before the first.
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

// Joined says whether a process is the sandbox's and in the network namespace that is pinned for
// it.
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

// OpenPin opens a sandbox's pin: NotFound if nothing is pinned.
func (p *Pins) OpenPin(id model.ContainerID) (*os.File, error) {
	path := p.Path(id)
	if path == "" {
		return nil, fmt.Errorf("network namespace of sandbox %s is not pinned: %w", id, errdefs.ErrNotFound)
	}
	return openNetNS(path)
}

// Path is the pin's path, "" when nothing is pinned.
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

// isPinnedIn says whether a namespace is mounted on a name of the directory at a path.
func isPinnedIn(path, name string) bool {
	dir, err := openDirectory(path)
	if err != nil {
		return false
	}
	defer dir.Close()
	return isPinned(dir, name)
}

// isPinned says whether a namespace is mounted on a name of the directory. Links are not followed.
func isPinned(dir *os.File, name string) bool {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return isNamespaceFile(fd)
}

// Addresses are those of a pod's interface in the namespace of its pause process, nil if there are
// none or the process is not the sandbox's.
func (p *Pins) Addresses(id model.ContainerID, pid int) []netip.Addr { return Addresses(id, pid) }

// Unpin gives the namespace up. What is not pinned is no error. The record goes last.
func (p *Pins) Unpin(id model.ContainerID) error {
	if id == "" {
		return nil
	}
	if err := unmountIn(p.dir, pinName(id)); err != nil {
		return err
	}
	return unmountIn(p.records, string(id))
}

// unmountIn undoes mountIn: it unmounts namespaces only, follows no link, and removes the name.
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

// unmountAll unmounts the namespaces on a name; a crash may have mounted it twice.
func unmountAll(dir *os.File, name string) error {
	file := fdPath(dir) + "/" + name
	for isPinned(dir, name) {
		if err := unix.Unmount(file, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unpin network namespace %s: %w", filepath.Join(dir.Name(), name), err)
		}
	}
	return nil
}

// List are the sandboxes for which a pin, or what a crash left of one, is there.
func (p *Pins) List() []model.ContainerID {
	var ids []model.ContainerID
	for _, name := range p.names() {
		if id, err := model.ParseContainerID(name); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}
