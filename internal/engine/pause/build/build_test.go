package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const amd64 = "../bin/pause-amd64"

// TestEmbeddedProgramsAreCurrent fails if the embedded programs do not match the source. Run make
// pause to update them.
func TestEmbeddedProgramsAreCurrent(t *testing.T) {
	for arch, machine := range machines() {
		want, err := program(arch, machine)
		if err != nil {
			t.Fatal(err)
		}

		got, err := os.ReadFile("../bin/pause-" + arch)
		if err != nil {
			t.Fatal(err)
		}

		if !bytes.Equal(got, want) {
			t.Errorf("%s: the embedded program is out of date; run make pause", arch)
		}
		if len(got) > 4096 {
			t.Errorf("%s: %d bytes", arch, len(got))
		}
	}
}

func TestExitsOnSignals(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd := exec.Command(amd64)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { cmd.Process.Kill() })
		waitFor(t, "the program waits for signals", func() bool {
			st := procStatus(cmd.Process.Pid)
			return strings.Contains(st, "Name:\tpause-amd64") && strings.Contains(st, "State:\tS")
		})

		if rss := residentKiB(t, procStatus(cmd.Process.Pid)); rss > 64 {
			t.Errorf("the program uses %d KiB of memory, want at most 64", rss)
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}

		if err := cmd.Wait(); err != nil {
			t.Errorf("exit on %v: %v", s, err)
		}
	}
}

// TestReapsOrphans runs the program as process 1 of a PID namespace. The shell before it starts a
// child, and exec makes this child an orphan of the program.
func TestReapsOrphans(t *testing.T) {
	cmd := exec.Command("sh", "-c", "(sleep 0.05 &) ; exec "+amd64)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()

	waitFor(t, "the shell executed the program", func() bool {
		return strings.Contains(procStatus(cmd.Process.Pid), "Name:\tpause-amd64")
	})
	children := func() string {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) +
			"/children")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}

	waitFor(t, "the orphan is reaped", func() bool { return children() == "" })
}

// rootfs is a root directory with the program and the file /netns.
type rootfs struct {
	dir string
	run []string // the command line inside
}

// rootfses returns a root directory for each architecture. The program of the foreign architecture
// runs with Debian's qemu-user-static.
func rootfses(t *testing.T) map[string]rootfs {
	t.Helper()
	out := map[string]rootfs{}
	for arch, emulator := range map[string]string{
		"amd64": "/usr/bin/qemu-x86_64-static",
		"arm64": "/usr/bin/qemu-aarch64-static",
	} {
		r := rootfs{t.TempDir(), []string{"/pause"}}
		files := map[string]string{"pause": "../bin/pause-" + arch}
		if arch != runtime.GOARCH {
			files["qemu"], r.run = emulator, []string{"/qemu", "/pause"}
		}

		for name, from := range files {
			b, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(filepath.Join(r.dir, name), b, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
		}

		out[arch] = r
	}

	return out
}

// start runs a script and then the program in the root directory, in new mount and network
// namespaces. The script gets the directory as $1.
func (r rootfs) start(t *testing.T, script string, args ...string) *exec.Cmd {
	t.Helper()
	script += `; dir=$1; shift; exec $wrap chroot "$dir" "$@"`
	arguments := []string{"-m", "-n", "--propagation", "private", "sh", "-ec", script, "sh", r.dir}
	arguments = append(arguments, r.run...)
	cmd := exec.Command("unshare", append(arguments, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })

	return cmd
}

// field returns the value of a field in the content of /proc/<pid>/status.
func field(status, name string) string {
	_, rest, _ := strings.Cut(status, "\n"+name+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Join(strings.Fields(line), " ")
}

func TestJoinsNamespaceAndDropsPrivileges(t *testing.T) {
	for arch, r := range rootfses(t) {
		for user, want := range map[string]credentials{
			"":                        {"0 0 0 0", "0 0 0 0", "*"},
			"1000 65534 5 4294967294": {"1000 1000 1000 1000", "65534 65534 65534 65534", "5 4294967294"},
			"7 8":                     {"7 7 7 7", "8 8 8 8", ""},
		} {
			t.Run(arch+" "+user, func(t *testing.T) { testJoin(t, r, user, want) })
		}
	}
}

// credentials are fields of /proc/<pid>/status. The value * matches any groups.
type credentials struct{ uid, gid, groups string }

func testJoin(t *testing.T, r rootfs, user string, want credentials) {
	cmd := r.start(t, `touch $1/netns; unshare -n mount --bind /proc/thread-self/ns/net $1/netns`,
		strings.Fields(user)...)
	waitFor(t, "the program waits for signals", func() bool {
		return strings.Contains(field(procStatus(cmd.Process.Pid), "State"), "S") &&
			field(procStatus(cmd.Process.Pid), "CapBnd") == "0000000000000000"
	})
	waitFor(t, "the program has dropped its capabilities", func() bool {
		return field(procStatus(cmd.Process.Pid), "CapPrm") == "0000000000000000"
	})

	status := procStatus(cmd.Process.Pid)
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got := field(status, set); got != "0000000000000000" {
			t.Errorf("%s is %s, want no capabilities", set, got)
		}
	}

	got := credentials{field(status, "Uid"), field(status, "Gid"), field(status, "Groups")}
	if want.groups == "*" {
		got.groups = "*"
	}
	if got != want {
		t.Errorf("credentials are %+v, want %+v", got, want)
	}

	proc := fmt.Sprintf("/proc/%d/", cmd.Process.Pid)
	var joined, pinned syscall.Stat_t
	err := errors.Join(syscall.Stat(proc+"ns/net", &joined), syscall.Stat(proc+"root/netns", &pinned))
	if err != nil || joined.Ino != pinned.Ino {
		t.Errorf("the program is in network namespace %d, want %d: %v", joined.Ino, pinned.Ino, err)
	}
}

// TestJoinErrors checks the exit codes after a failed join: the error number of setns, 100 plus the
// error number of open, and 200 if capabilities cannot be dropped.
func TestJoinErrors(t *testing.T) {
	for arch, r := range rootfses(t) {
		for script, want := range map[string]int{
			`touch $1/netns`: int(syscall.EINVAL),
			`touch $1/netns; mount --bind /proc/$$/ns/net $1/netns; wrap="setpriv --bounding-set ` +
				`-sys_admin"`: int(syscall.EPERM),
			`ln -sf netns $1/netns`: 100 + int(syscall.ELOOP),
			`touch $1/netns; mount --bind /proc/$$/ns/net $1/netns; wrap="setpriv --bounding-set -setpcap"`: 200,
		} {
			_ = os.Remove(filepath.Join(r.dir, "netns"))
			err := r.start(t, script).Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != want {
				t.Errorf("%s, %s: %v, want exit code %d", arch, script, err, want)
			}
		}
	}
}

func procStatus(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return string(b)
}

// residentKiB returns VmRSS from the content of /proc/<pid>/status.
func residentKiB(t *testing.T, status string) int {
	t.Helper()
	_, rest, _ := strings.Cut(status, "VmRSS:")
	line, _, _ := strings.Cut(rest, " kB")
	n, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("VmRSS: %v", err)
	}

	return n
}

func waitFor(t *testing.T, condition string, isMet func() bool) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !isMet(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within 5 s: %s", condition)
		}
	}
}
