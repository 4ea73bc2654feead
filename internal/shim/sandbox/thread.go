package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/thread"
)

// fork starts the pause with these descriptors in a control group and returns its PID. The calling
// thread takes on all properties of the pause before, so that nothing but execve runs in the new
// process.
func (p *Plan) fork(g group, env []string, files [3]uintptr) (pid int, err error) {
	thread.Run(func() {
		for _, step := range []func() error{
			g.enter,
			p.joinNetNS,
			p.unshare,
			p.setSysctls,
			p.setHostname,
			p.setAppArmor,
			p.changeRoot,
			p.dropPrivileges,
			p.setFilter,
		} {
			if err = step(); err != nil {
				return
			}
		}

		// The program of the image, in its root and without privileges.
		pid, err = syscall.ForkExec(p.args[0], p.args, &syscall.ProcAttr{Env: env, Files: files[:]}) //#nosec G204
		err = wrap(err, "execute %s", p.args[0])
	})

	return pid, err
}

// wrap adds the operation to an error.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}

func (p *Plan) joinNetNS() error {
	if p.netns == "" {
		return nil
	}

	fd, err := unix.Open(p.netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return wrap(err, "open network namespace %s", p.netns)
	}
	defer unix.Close(fd)

	return wrap(unix.Setns(fd, unix.CLONE_NEWNET), "join network namespace %s", p.netns)
}

// unshare creates the namespaces. With CLONE_NEWPID, the next child is process 1 of the new
// namespace. The threads of a process share their root directory until CLONE_FS.
func (p *Plan) unshare() error {
	if err := unix.Unshare(unix.CLONE_FS | int(p.flags)); err != nil {
		return wrap(err, "create namespaces")
	}
	return wrap(unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""), "separate the mounts from the node's")
}

// setSysctls writes the sysctls. The kernel applies them to the namespaces of the writing thread.
func (p *Plan) setSysctls() error {
	for name, value := range p.sysctls {
		file := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return wrap(err, "sysctl %s", name)
		}
	}
	return nil
}

func (p *Plan) setHostname() error {
	if p.hostname == "" {
		return nil
	}
	return wrap(unix.Sethostname([]byte(p.hostname)), "set the host name")
}

// setAppArmor sets the profile for the next execve. A child inherits this setting.
func (p *Plan) setAppArmor() error {
	if p.apparmor == "" || p.apparmor == "unconfined" {
		return nil
	}

	for _, file := range []string{"/proc/thread-self/attr/apparmor/exec", "/proc/thread-self/attr/exec"} {
		err := os.WriteFile(file, []byte("exec "+p.apparmor), 0)
		if !errors.Is(err, os.ErrNotExist) { // kernels before 5.1 have only the second file
			return wrap(err, "AppArmor profile %s", p.apparmor)
		}
	}

	return fmt.Errorf("AppArmor profile %s: the kernel has no AppArmor", p.apparmor)
}

// changeRoot makes the root of the image the root directory, read-only, and removes all other
// mounts from the namespace (pivot_root(2), "pivot_root(".", ".")").
func (p *Plan) changeRoot() error {
	const flags = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	for _, step := range []func() error{
		func() error { return unix.Mount(p.root, p.root, "", unix.MS_BIND, "") },
		func() error { return unix.Chdir(p.root) },
		func() error { return unix.PivotRoot(".", ".") },
		func() error { return unix.Unmount(".", unix.MNT_DETACH) },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Mount("", "/", "", flags, "") },
	} {
		if err := step(); err != nil {
			return wrap(err, "change the root to %s", p.root)
		}
	}
	return nil
}

// dropPrivileges sets user and groups and drops all capabilities, also for programs of root
// (capabilities(7)). The functions of package syscall would change all threads of the process.
func (p *Plan) dropPrivileges() error {
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // beyond the last capability
			break
		}
		if err != nil {
			return wrap(err, "drop capability %d", c)
		}
	}

	var groups unsafe.Pointer
	if len(p.groups) > 0 {
		groups = unsafe.Pointer(&p.groups[0])
	}

	uid, gid := uintptr(p.uid), uintptr(p.gid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(p.groups)), uintptr(groups), 0); errno != 0 {
		return wrap(errno, "set groups %d", p.groups)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return wrap(errno, "set group %d", p.gid)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return wrap(errno, "set user %d", p.uid)
	}

	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&header, &(&[2]unix.CapUserData{})[0]); err != nil {
		return wrap(err, "drop capabilities")
	}

	return wrap(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
}

// setFilter loads the seccomp filter for this thread and its children.
func (p *Plan) setFilter() error {
	if len(p.filter) == 0 {
		return nil
	}

	program := unix.SockFprog{Len: uint16(len(p.filter)), Filter: &p.filter[0]}
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
	runtime.KeepAlive(p.filter)

	return wrap(err, "load the seccomp filter")
}
