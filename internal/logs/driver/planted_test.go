package driver

import (
	"errors"
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

// planted are things that somebody with access to a pod's log directory puts in the place of a
// file. foreign is a file of somebody else.
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

// victim makes a file of somebody else, and checks at the end that nothing has happened to it.
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
			t.Errorf("a file was made through a link: %v", err)
		}
	})

	return foreign
}

// TestPlantedBeforeStart: whatever stands at a log's path, the container starts and its output is
// there.
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
			c.say("one")
			c.stop()
			c.isLog(t, c.log.String(), "stdout F one")
		})
	}
}

// isLog checks that a path is a file of its own with these lines, and that there is nothing beside
// it.
func (c *container) isLog(t *testing.T, path string, lines ...string) {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Nlink != 1 {
		t.Fatalf("the log has mode %#o and %d names, %v", st.Mode, st.Nlink, err)
	}

	if diff := cmp.Diff(lines, texts(t, path)); diff != "" {
		t.Error(diff)
	}

	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}

	for _, l := range left {
		if strings.HasPrefix(l.Name(), ".") {
			t.Errorf("beside the log: %v", l)
		}
	}
}

// TestPlantedDuringRotation: the kubelet has renamed the log, and somebody else is faster than
// Reopen.
func TestPlantedDuringRotation(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			foreign := victim(t, dir)
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			c.say("one")
			eventually(t, "one line", func() bool { return len(texts(t, c.log.String())) == 1 })
			old := c.log.String() + ".20260102-030405"
			if err := errors.Join(os.Rename(c.log.String(), old), plant(foreign, c.log.String()),
				d.Reopen(t.Context(), c.id)); err != nil {
				t.Fatal(err)
			}

			c.say("two")
			c.stop()
			c.isLog(t, old, "stdout F one")
			c.isLog(t, c.log.String(), "stdout F two")
		})
	}
}

// TestPlantedInsteadOfTheLog: somebody deletes the log of a running container and puts something
// else there, also while this process is away.
func TestPlantedInsteadOfTheLog(t *testing.T) {
	for name, plant := range planted {
		for _, away := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				foreign := victim(t, dir)
				d, e := newDriver(t, dir)
				c := e.container("aa")
				c.start()
				if away {
					d.Close()
				}
				if err := errors.Join(os.Remove(c.log.String()), plant(foreign, c.log.String())); err != nil {
					t.Fatal(err)
				}

				if away {
					_, next := newDriver(t, dir)
					e.http = next.http
				} else {
					s := c.stream(d)
					s.lock()
					s.checked = time.Time{} // a second later
					s.unlock()
				}

				c.say("one")
				c.stop()
				c.isLog(t, c.log.String(), "stdout F one")
			})
		}
	}
}

// TestPlantedForReaders: docker logs shows neither what a link leads to nor waits for a FIFO.
func TestPlantedForReaders(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			l := newLogged(t)
			foreign := victim(t, l.e.dir)
			l.start()
			l.say("1")
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
				t.Errorf("of what was planted: %q", got)
			}
		})
	}
}

// TestPlantedDirectory: links in the place of the pod's log directory or a directory in it are not
// followed, and the error says which.
func TestPlantedDirectory(t *testing.T) {
	for _, at := range []string{"pods/default_web_uid", "pods/default_web_uid/main-aa"} {
		t.Run(at, func(t *testing.T) {
			dir := t.TempDir()
			_, e := newDriver(t, dir)
			outside, link := filepath.Join(dir, "outside"), filepath.Join(dir, at)
			for _, err := range []error{
				os.Mkdir(outside, 0o755), os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(outside, link),
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

			if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
				t.Errorf("outside: %v, %v", left, err)
			}
		})
	}
}

// TestLinkAboveThePods: an operator may keep logs on another disk.
func TestLinkAboveThePods(t *testing.T) {
	dir := t.TempDir()
	_, e := newDriver(t, dir)
	disk := filepath.Join(dir, "disk")
	if err := errors.Join(os.Mkdir(disk, 0o755), os.Symlink(disk, filepath.Join(dir, "pods"))); err != nil {
		t.Fatal(err)
	}

	c := e.container("aa")
	c.start()
	c.say("one")
	c.stop()
	c.isLog(t, c.log.String(), "stdout F one")
}

// TestFIFOIsDockers: only a FIFO in Docker's directory is taken, so that no name of the engine's
// becomes a file elsewhere, or makes one be removed.
func TestFIFOIsDockers(t *testing.T) {
	dir := t.TempDir()
	foreign := victim(t, dir)
	d, e := newDriver(t, dir)
	c := e.container("aa")
	file, link, sub, device := filepath.Join(dir, "regular"), filepath.Join(dir, "link"), filepath.Join(dir, "sub"),
		filepath.Join(dir, "random")
	for _, err := range []error{
		syscall.Mknod(device, syscall.S_IFCHR|0o600, int(unix.Mkdev(1, 8))), // it can be polled as a FIFO can
		os.WriteFile(file, nil, 0o600), os.Symlink(c.FIFOPath, link), os.Mkdir(sub, 0o700),
		syscall.Mkfifo(filepath.Join(sub, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	for _, bad := range []string{
		"", "/", "fifo-aa", foreign, file, link, sub, device, filepath.Join(sub, "fifo"), dir + "/../" +
			filepath.Base(dir) + "/fifo-aa", dir + "//fifo-aa",
		dir + "/fifo-aa/", dir + "/.", dir + "/..", dir + "/nothing", dir + "/" + strings.Repeat("x", 200), dir +
			"/fifo\x00-aa", dir + "/fifo\n",
	} {
		if err := e.call("/LogDriver.StartLogging", map[string]any{"File": bad, "Info": c.info()}); err == "" {
			t.Errorf("%q is accepted", bad)
		}
	}

	if left, _ := os.ReadDir(d.table.dir); len(left) > 0 {
		t.Errorf("the table has %v", left)
	}

	c.start()
	c.stop()
}
