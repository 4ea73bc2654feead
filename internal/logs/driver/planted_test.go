package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const secretText = "2026-01-02T03:04:05.000000006Z stdout F secret\nno newline at its end"

// planted replaces a log with something else, as users with access to a pod's log directory can.
// foreign is a file of another user.
var planted = map[string]func(foreign, at string) error{
	"a link to a file":   os.Symlink,
	"a link to nothing":  func(foreign, at string) error { return os.Symlink(foreign+"-new", at) },
	"a link to a folder": func(foreign, at string) error { return os.Symlink(filepath.Dir(foreign), at) },
	"a link to itself":   func(_, at string) error { return os.Symlink(filepath.Base(at), at) },
	"a link within":      func(_, at string) error { return os.Symlink("neighbour.log", at) },
	"a hard link":        os.Link,
	"a FIFO":             func(_, at string) error { return syscall.Mkfifo(at, 0o600) },
	"a socket":           func(_, at string) error { return syscall.Mknod(at, syscall.S_IFSOCK|0o600, 0) },
	"a device": func(_, at string) error {
		return syscall.Mknod(at, syscall.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))
	},
	"a link to a FIFO": func(_, at string) error {
		return errors.Join(syscall.Mkfifo(at+"-fifo", 0o600), os.Symlink(at+"-fifo", at))
	},
	"a link to a device": func(_, at string) error { return os.Symlink("/dev/tty", at) },
	"a link to our table": func(foreign, at string) error {
		return os.Symlink(filepath.Join(filepath.Dir(foreign), "table"), at)
	},
}

// victim creates another user's file, and checks at the end of the test that it is unchanged.
func victim(t *testing.T, dir string) (foreign string) {
	t.Helper()
	foreign = filepath.Join(dir, "foreign")
	if err := os.WriteFile(foreign, []byte(secretText), 0o604); err != nil {
		t.Fatal(err)
	}

	before, err := os.Stat(foreign)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		b, err := os.ReadFile(foreign)
		after, statErr := os.Stat(foreign)
		if err != nil || statErr != nil || string(b) != secretText || after.Mode() != before.Mode() ||
			!after.ModTime().Equal(before.ModTime()) {
			t.Errorf("the foreign file is %q, %v; %v", b, after, errors.Join(err, statErr))
		}

		if _, err := os.Lstat(foreign + "-new"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file was created through a link: %v", err)
		}
	})

	return foreign
}

// TestPlantedBeforeStart expects a container to start and log its output, whatever is at its log's
// path.
func TestPlantedBeforeStart(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			foreign := victim(t, dir)
			_, e := newDriver(t, dir)
			c := e.container("aa")
			if err := errors.Join(os.MkdirAll(filepath.Dir(c.log.String()), 0o755),
				plant(foreign, c.log.String())); err != nil {
				t.Fatal(err)
			}

			c.start()
			c.print("one")
			c.stop()
			c.checkLog(t, c.log.String(), "stdout F one")
		})
	}
}

// checkLog expects path to be a regular file of its own with these lines, and no temporary files
// beside it.
func (c *container) checkLog(t *testing.T, path string, lines ...string) {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Nlink != 1 {
		t.Fatalf("the log has mode %#o and %d names, %v", st.Mode, st.Nlink, err)
	}

	if diff := cmp.Diff(lines, texts(t, path)); diff != "" {
		t.Error(diff)
	}

	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}

	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".") {
			t.Errorf("temporary file beside the log: %v", f)
		}
	}
}

// TestPlantedDuringRotation plants a file between the kubelet's rename of the log and Reopen.
func TestPlantedDuringRotation(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			foreign := victim(t, dir)
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			c.print("one")
			eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
			old := c.log.String() + ".20260102-030405"
			if err := errors.Join(os.Rename(c.log.String(), old), plant(foreign, c.log.String()),
				d.Reopen(t.Context(), c.id)); err != nil {
				t.Fatal(err)
			}

			c.print("two")
			c.stop()
			c.checkLog(t, old, "stdout F one")
			c.checkLog(t, c.log.String(), "stdout F two")
		})
	}
}

// TestPlantedInsteadOfTheLog replaces the log of a running container, with and without a running
// log-driver process.
func TestPlantedInsteadOfTheLog(t *testing.T) {
	for name, plant := range planted {
		for _, isDown := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, process down: %v", name, isDown), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				foreign := victim(t, dir)
				d, e := newDriver(t, dir)
				c := e.container("aa")
				c.start()
				if isDown {
					d.Close()
				}
				if err := errors.Join(os.Remove(c.log.String()), plant(foreign, c.log.String())); err != nil {
					t.Fatal(err)
				}

				if isDown {
					_, next := newDriver(t, dir)
					e.http = next.http
				} else {
					s := c.stream(d)
					s.lock()
					s.checked = time.Time{} // a second later
					s.unlock()
				}

				c.print("one")
				c.stop()
				c.checkLog(t, c.log.String(), "stdout F one")
			})
		}
	}
}

// TestPlantedForReaders expects docker logs neither to follow a link nor to wait for a FIFO.
func TestPlantedForReaders(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			l := newLogged(t)
			foreign := victim(t, l.e.dir)
			l.start()
			l.print("1")
			eventually(t, "written", func() bool { return len(texts(t, l.log.String())) == 1 })
			if err := plant(foreign, l.log.String()+".20260102-030405"); err != nil {
				t.Fatal(err)
			}

			if diff := cmp.Diff([]string{"1\n"}, all(l.read(readConfig{Tail: -1}))); diff != "" {
				t.Error(diff)
			}

			l.stop()
			if err := errors.Join(os.Remove(l.log.String()), plant(foreign, l.log.String())); err != nil &&
				!errors.Is(err, fs.ErrExist) {
				t.Fatal(err)
			}

			if got := all(l.read(readConfig{Tail: -1})); len(got) > 0 {
				t.Errorf("docker logs returned planted lines: %q", got)
			}
		})
	}
}

// TestPlantedDirectory expects a link in the place of the pod's log directory, or of a directory in
// it, to be refused and named in the error.
func TestPlantedDirectory(t *testing.T) {
	for _, at := range []string{"pods/default_web_uid", "pods/default_web_uid/main-aa"} {
		t.Run(at, func(t *testing.T) {
			dir := t.TempDir()
			_, e := newDriver(t, dir)
			outside, link := filepath.Join(dir, "outside"), filepath.Join(dir, at)
			for _, err := range []error{
				os.Mkdir(outside, 0o755),
				os.MkdirAll(filepath.Dir(link), 0o755),
				os.Symlink(outside, link),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}

			c := e.container("aa")
			err := e.call("/LogDriver.StartLogging", map[string]any{"File": c.FIFOPath, "Info": c.info()})
			if !strings.Contains(err, link) || !strings.Contains(err, "links are not followed") {
				t.Errorf("StartLogging: %q", err)
			}

			if files, err := os.ReadDir(outside); err != nil || len(files) > 0 {
				t.Errorf("files outside: %v, %v", files, err)
			}
		})
	}
}

// TestLinkAboveThePods keeps the logs on another disk behind a link, as an operator may.
func TestLinkAboveThePods(t *testing.T) {
	dir := t.TempDir()
	_, e := newDriver(t, dir)
	disk := filepath.Join(dir, "disk")
	if err := errors.Join(os.Mkdir(disk, 0o755), os.Symlink(disk, filepath.Join(dir, "pods"))); err != nil {
		t.Fatal(err)
	}

	c := e.container("aa")
	c.start()
	c.print("one")
	c.stop()
	c.checkLog(t, c.log.String(), "stdout F one")
}

// TestFIFOIsDockers accepts only a FIFO in Docker's directory, so that a path from the engine never
// creates or removes a file elsewhere.
func TestFIFOIsDockers(t *testing.T) {
	dir := t.TempDir()
	foreign := victim(t, dir)
	d, e := newDriver(t, dir)
	c := e.container("aa")
	file, link := filepath.Join(dir, "regular"), filepath.Join(dir, "link")
	sub, device := filepath.Join(dir, "sub"), filepath.Join(dir, "random")
	for _, err := range []error{
		syscall.Mknod(device, syscall.S_IFCHR|0o600, int(unix.Mkdev(1, 8))), // can be polled like a FIFO
		os.WriteFile(file, nil, 0o600),
		os.Symlink(c.FIFOPath, link),
		os.Mkdir(sub, 0o700),
		syscall.Mkfifo(filepath.Join(sub, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	for _, bad := range []string{
		"", "/", "fifo-aa", foreign, file, link, sub, device, filepath.Join(sub, "fifo"),
		dir + "/../" + filepath.Base(dir) + "/fifo-aa",
		dir + "//fifo-aa",
		dir + "/fifo-aa/",
		dir + "/.",
		dir + "/..",
		dir + "/nothing",
		dir + "/" + strings.Repeat("x", 200),
		dir + "/fifo\x00-aa",
		dir + "/fifo\n",
	} {
		if err := e.call("/LogDriver.StartLogging", map[string]any{"File": bad, "Info": c.info()}); err == "" {
			t.Errorf("%q was accepted", bad)
		}
	}

	checkTableIsEmpty(t, d)
	c.start()
	c.stop()
}
