package podnet

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// newMark is the prefix of namespaces without a sandbox, followed by 16 hexadecimal digits.
const newMark = "new-"

// isNewName reports whether a file name has the form of Create.
func isNewName(name string) bool {
	digits, ok := strings.CutPrefix(name, newMark)
	b, err := hex.DecodeString(digits)
	return ok && err == nil && len(b) == 8
}

// Create creates a network namespace with lo up, Docker's defaults and these sysctls (such as
// "net.core.somaxconn"). It pins the namespace until Drop and returns the pin's path. It returns
// InvalidArgument for an invalid sysctl.
func (p *Pins) Create(sysctls map[string]string) (path string, err error) {
	parsed, err := parseSysctls(sysctls)
	if err != nil {
		return "", fmt.Errorf("create network namespace: %w", err)
	}

	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	name := newMark + hex.EncodeToString(b)
	p.mu.Lock()
	p.created[name] = true
	p.mu.Unlock()

	path = filepath.Join(p.records, name)
	enter := func() error { return os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET)) }
	err = runInOtherNetNS(enter, func() error {
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
		return "", errors.Join(fmt.Errorf("create network namespace: %w", err), p.Drop(path))
	}

	return path, nil
}

// Drop removes the pin of Create. A pin of Keep or a process in the namespace keeps it alive.
func (p *Pins) Drop(path string) error {
	name := filepath.Base(path)
	if filepath.Dir(path) != filepath.Clean(p.records) || !isNewName(name) {
		return fmt.Errorf("unpin network namespace: %q is not one of our namespaces: %w", path,
			errdefs.ErrInvalidArgument)
	}

	err := unmountIn(p.records, name)
	p.mu.Lock()
	defer p.mu.Unlock()

	delete(p.created, name)

	return err
}

// Sweep drops the namespaces of earlier processes, and the links that they did not complete.
func (p *Pins) Sweep() error {
	var errs []error
	for _, name := range p.names() {
		p.mu.Lock()
		ours := p.created[name]
		p.mu.Unlock()

		isLink := strings.HasPrefix(name, newRecord) && !strings.HasPrefix(name, p.next)
		if isLink || isNewName(name) && !ours {
			errs = append(errs, unmountIn(p.records, name))
		}
	}

	return errors.Join(errs...)
}
