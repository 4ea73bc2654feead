package proc

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary act as a process to find. It then waits until its input ends.
func TestMain(m *testing.M) {
	if os.Getenv("PROC_TEST_WAIT") != "" {
		fmt.Println(os.Getpid())
		_, _ = bufio.NewReader(os.Stdin).ReadByte() // ends with the test
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs a copy of this program under a name and returns its PID in our namespace.
func start(t *testing.T, name string, attr *syscall.SysProcAttr, argv ...string) int {
	t.Helper()
	dir, err := os.MkdirTemp("", "proc")
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}

	program := filepath.Join(dir, name)
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, self, 0o755)); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(program)
	cmd.Args = append([]string{name}, argv...)
	cmd.Env, cmd.SysProcAttr, cmd.Dir = append(os.Environ(), "PROC_TEST_WAIT=1"), attr, "/"
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}

	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}

	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { in.Close(); cmd.Wait() }) //nolint:errcheck // it ends with its input
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}

	return cmd.Process.Pid
}

// TestOnlyRootOfThisHost starts the same program as root, as another user and in other namespaces.
func TestOnlyRootOfThisHost(t *testing.T) {
	const name = "proc-test-daemon"
	for kind, c := range map[string]struct {
		attr *syscall.SysProcAttr
		want bool
	}{
		"root":              {nil, true},
		"nobody":            {&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, false},
		"a mount namespace": {&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, false},
		"a PID namespace":   {&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, false},
		"root of a user space": {&syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}},
		}, false},
	} {
		t.Run(kind, func(t *testing.T) {
			pid := start(t, name, c.attr, "--a", "b\nc")
			found := Host().Find(func(n string) bool { return n == name })
			i := slices.IndexFunc(found, func(p Process) bool { return p.PID == pid })
			if (i >= 0) != c.want {
				t.Fatalf("found %+v", found)
			}

			p, err := Host().Process(pid)
			if (err == nil) != c.want || c.want &&
				(cmp.Diff([]string{"--a", "b\nc"}, p.Args) != "" || filepath.Base(p.Program) != name) {
				t.Errorf("process %+v, error %v", p, err)
			}

			// Only root can create a user namespace that maps its root to the host's root.
			byStatus := c.want || kind == "a mount namespace" || kind == "root of a user space"
			if _, err := Host().ByStatus().Process(pid); (err == nil) != byStatus {
				t.Errorf("process by status: error %v, want success %v", err, byStatus)
			}
		})
	}
}

func TestSetuidProgramsAreNotRoot(t *testing.T) {
	for status, want := range map[string]bool{
		"Uid:\t0\t0\t0\t0\n":       true,
		"Uid:\t1000\t0\t0\t0\n":    false,
		"Uid:\t0\t1000\t0\t1000\n": false,
		"Uid:\t0\t0\t1000\t0\n":    false,
		"":                         false,
	} {
		t.Run(status, func(t *testing.T) {
			f := tree(t, map[string]string{"7/status": status})
			if _, err := f.Process(7); (err == nil) != want {
				t.Errorf("error %v, want success %v", err, want)
			}
		})
	}
}

// tree creates a procfs with process 7 and ourselves. The entries of files override the defaults.
func tree(t *testing.T, files map[string]string) FS {
	t.Helper()
	root := t.TempDir()
	all := map[string]string{
		"7/status":  "Uid:\t0\t0\t0\t0\n",
		"7/stat":    "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 500\n",
		"7/cmdline": "/usr/bin/d\x00--x\x00",
	}

	for name, content := range files {
		all[name] = content
	}

	links := map[string]string{"7/exe": "/usr/bin/d (deleted)"}
	for _, dir := range []string{"7", "self"} {
		for _, ns := range []string{"user", "pid", "mnt"} {
			links[dir+"/ns/"+ns] = ns + ":[1]"
		}
	}

	for name := range links {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}

	for name, content := range all {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	return At(root)
}

// TestProcessChangesWhileRead replaces the program, or reuses the PID, between the two identity
// checks.
func TestProcessChangesWhileRead(t *testing.T) {
	for name, change := range map[string]func(dir string) error{
		"another program": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "exe")), os.Symlink("/bin/sh", filepath.Join(dir, "exe")))
		},
		"another start": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "stat"),
				[]byte("7 (d) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 501\n"), 0o644)
		},
		"another user": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "status"), []byte("Uid:\t1000\t1000\t1000\t1000\n"), 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := tree(t, nil)
			_, err := f.read(7, func(string) bool { // called between the two identity checks
				if err := change(filepath.Join(f.root, "7")); err != nil {
					t.Error(err)
				}
				return true
			})
			if !errors.Is(err, ErrForeign) {
				t.Errorf("error %v, want ErrForeign", err)
			}
		})
	}
}

func TestLongCommandLines(t *testing.T) {
	f := tree(t, map[string]string{"7/cmdline": strings.Repeat("x", maxArgs+1)})
	if p, err := f.Process(7); err == nil {
		t.Errorf("%d arguments, want an error", len(p.Args))
	}
}

func TestSignal(t *testing.T) {
	pid := start(t, "proc-test-signal", nil)
	p, err := Host().Process(pid)
	if err != nil {
		t.Fatal(err)
	}

	other := p
	other.start = "1" // the PID was reused
	if err := Host().Signal(other, unix.SIGKILL); !errors.Is(err, ErrForeign) {
		t.Errorf("signal to an older process: error %v, want ErrForeign", err)
	}

	if err := Host().Signal(p, unix.SIGTERM); err != nil {
		t.Error(err)
	}
}

func TestForeign(t *testing.T) {
	f := tree(t, nil)
	if got := f.Foreign(); got != "" {
		t.Errorf("without process 1: %q", got)
	}

	for ns, want := range map[string]string{"mnt": "mount", "pid": "PID", "user": "user"} {
		t.Run(ns, func(t *testing.T) {
			f := tree(t, nil)
			if err := os.Mkdir(filepath.Join(f.root, "1"), 0o755); err != nil {
				t.Fatal(err)
			}

			if err := os.CopyFS(filepath.Join(f.root, "1"), os.DirFS(filepath.Join(f.root, "self"))); err != nil {
				t.Fatal(err)
			}

			if got := f.Foreign(); got != "" {
				t.Errorf("the same namespaces: %q", got)
			}

			link := filepath.Join(f.root, "1/ns", ns)
			if err := errors.Join(os.Remove(link), os.Symlink(ns+":[2]", link)); err != nil {
				t.Fatal(err)
			}

			if got := f.Foreign(); got != "it does not run in the "+want+" namespace of process 1" {
				t.Errorf("another %s namespace: got %q", ns, got)
			}
			if err := os.Remove(link); err != nil {
				t.Fatal(err)
			}

			if got := f.Foreign(); got != "the namespaces of process 1 cannot be read" {
				t.Errorf("unreadable %s namespace: got %q", ns, got)
			}
		})
	}
}

func TestDir(t *testing.T) {
	d, err := Host().Open(strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()

	var ours, theirs unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &ours), unix.Stat(d.Path("ns/net"), &theirs)); err != nil ||
		ours.Ino != theirs.Ino {
		t.Errorf("network namespaces %d and %d differ, %v", ours.Ino, theirs.Ino, err)
	}

	if d.InCgroup("") || d.InCgroup("no such container") || !d.InCgroup(":") {
		t.Error("control group")
	}
	if len(d.Links("fd")) == 0 || d.Links("none") != nil {
		t.Error("links")
	}
}
