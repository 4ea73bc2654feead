package podnet

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

const (
	// bytes; the kernel's longest have about 60, including an interface name
	maxSysctlName  = 256
	maxSysctlValue = 4 << 10 // bytes; proc(5) accepts one page
)

// sysctl is a checked kernel parameter of a network namespace.
type sysctl struct {
	name  string // as given by the pod's author
	path  string // below /proc/sys: "net/core/somaxconn"
	value string
}

// parseSysctl checks a parameter of a pod. Its name is separated by dots or slashes, as in
// sysctl(8). The first separator decides. If it is a dot, a slash stands for a dot within a part:
// "net.ipv4.conf.eth0/1.forwarding" is net/ipv4/conf/eth0.1/forwarding. The error is
// InvalidArgument.
func parseSysctl(name, value string) (sysctl, error) {
	invalid := func(reason string) (sysctl, error) {
		return sysctl{}, fmt.Errorf("sysctl %q %s: %w", excerpt([]byte(name)), reason, errdefs.ErrInvalidArgument)
	}
	if len(name) > maxSysctlName {
		return invalid("has a name that is too long")
	}

	path := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		path = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}

	parts := strings.Split(path, "/")
	for _, part := range parts {
		if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, isInvalidInName) {
			return invalid("is not a name of the form net.core.somaxconn")
		}
	}

	if parts[0] != "net" || len(parts) < 2 {
		return invalid("does not belong to a network namespace; its name must begin with net.")
	}
	if len(value) > maxSysctlValue || strings.ContainsFunc(value, isInvalidInValue) {
		return invalid(fmt.Sprintf("has an invalid value; use at most %d printable characters on one line",
			maxSysctlValue))
	}

	return sysctl{name, path, value}, nil
}

// isInvalidInName reports whether no parameter's name can have a character.
func isInvalidInName(r rune) bool { return r <= ' ' || r > '~' || r == '\\' }

// isInvalidInValue reports whether no parameter's value can have a character.
func isInvalidInValue(r rune) bool { return r != '\t' && (r < ' ' || r > '~') }

// defaultSysctls returns Docker's defaults for its own network namespaces, which let pods use low
// ports and ping. Parameters unknown to the kernel are skipped.
func defaultSysctls() []sysctl {
	return []sysctl{
		{path: "net/ipv4/ip_unprivileged_port_start", value: "0"},
		{path: "net/ipv4/ping_group_range", value: "0 2147483647"},
	}
}

// parseSysctls checks the parameters of a pod.
func parseSysctls(sysctls map[string]string) ([]sysctl, error) {
	var all []sysctl
	var errs []error
	for name, value := range sysctls {
		s, err := parseSysctl(name, value)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, s)
	}

	return all, errors.Join(errs...)
}

// writeSysctls sets the defaults and then these parameters in the thread's network namespace. The
// kernel resolves /proc/sys/net in the namespace of the thread opening a file (proc(5)).
func writeSysctls(sysctls []sysctl) error {
	dir, err := safefs.OpenDir("/proc/sys")
	if err != nil {
		return err
	}
	defer dir.Close()

	for _, s := range defaultSysctls() {
		if err := s.write(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl %s=%q: %w", s.path, s.value, err)
		}
	}

	for _, s := range sysctls {
		err := s.write(dir)
		if err == nil {
			continue
		}

		err = fmt.Errorf("sysctl %s=%q: %w", s.name, excerpt([]byte(s.value)), err)
		if isRefused(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}

		return err
	}

	return nil
}

// isRefused reports whether the kernel has no such parameter or rejects the value.
func isRefused(err error) bool {
	for _, kind := range []error{os.ErrNotExist, os.ErrPermission, unix.EINVAL, unix.EISDIR, unix.ENOTDIR,
		unix.ERANGE} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

func (s sysctl) write(procSys *os.File) error {
	f, err := safefs.OpenAt(procSys, s.path, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s.value)
	return errors.Join(err, f.Close())
}
