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
	// bytes; the kernel's longest have some 60, with the name of an interface
	maxSysctlName  = 256
	maxSysctlValue = 4 << 10 // bytes; proc(5) takes one page
)

// sysctl is a kernel parameter of a network namespace, checked.
type sysctl struct {
	name  string // as its author wrote it
	path  string // below /proc/sys: "net/core/somaxconn"
	value string
}

// parseSysctl checks a parameter that a pod's author wrote. Its name has dots or slashes between
// its parts, as sysctl(8) has it: the first separator counts, and with dots the other one is a dot
// within a part ("net.ipv4.conf.eth0/1.forwarding" is net/ipv4/conf/eth0.1/forwarding). The error
// is InvalidArgument.
func parseSysctl(name, value string) (sysctl, error) {
	invalid := func(why string) (sysctl, error) {
		return sysctl{}, fmt.Errorf("sysctl %q %s: %w", shown([]byte(name)), why, errdefs.ErrInvalidArgument)
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
		if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, isOdd) {
			return invalid("is not a name of the form net.core.somaxconn")
		}
	}

	if parts[0] != "net" || len(parts) < 2 {
		return invalid("is not one of a network namespace; those begin with net.")
	}
	if len(value) > maxSysctlValue || strings.ContainsFunc(value, isNoText) {
		return invalid(fmt.Sprintf("has a value that is no line of at most %d printable characters", maxSysctlValue))
	}

	return sysctl{name, path, value}, nil
}

// isOdd says whether a character can be in no name of a parameter.
func isOdd(r rune) bool { return r <= ' ' || r > '~' || r == '\\' }

// isNoText says whether a character can be in no value of a parameter.
func isNoText(r rune) bool { return r != '\t' && (r < ' ' || r > '~') }

// defaultSysctls are what Docker sets in network namespaces of its own, as far as the kernel has
// them: pods may use low ports and ping.
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

// writeSysctls sets parameters of the thread's network namespace, after the defaults. The kernel
// resolves /proc/sys/net in the namespace of the thread that opens a file (proc(5)).
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

		err = fmt.Errorf("sysctl %s=%q: %w", s.name, shown([]byte(s.value)), err)
		if isRefused(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}

		return err
	}

	return nil
}

// isRefused says whether the kernel has no such parameter or does not take the value.
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
