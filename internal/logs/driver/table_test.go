package driver

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/model"
)

// TestUnreadableTable damages and plants files of the table. They must be set aside, and all others
// resumed.
func TestUnreadableTable(t *testing.T) {
	dir := t.TempDir()
	table := filepath.Join(dir, "table")
	d, e := newDriver(t, dir)
	c := e.container("aa")
	c.start()
	d.Close()

	good := filepath.Join(table, filepath.Base(c.FIFOPath)+".json")
	entry, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}

	outside := filepath.Join(dir, "outside")
	broken := map[string]string{
		"torn.json":      string(entry[:len(entry)/2]),
		"empty.json":     "",
		"huge.json":      strings.Repeat(" ", maxEntry) + string(entry),
		"other.json":     string(entry),
		"deep.json":      strings.Repeat("[", 20000),
		"escape.json":    strings.ReplaceAll(string(entry), dir+"/fifo", dir+"/../fifo"),
		"relative.json":  strings.ReplaceAll(string(entry), c.log.Directory, "pods"),
		"container.json": strings.ReplaceAll(string(entry), c.id, "../../x"),
	}

	for name, text := range broken {
		if err := os.WriteFile(filepath.Join(table, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	for _, err := range []error{
		os.WriteFile(outside, []byte("{}"), 0o600),
		os.Symlink(outside, filepath.Join(table, "link.json")),
		syscall.Mkfifo(filepath.Join(table, "fifo.json"), 0o600),
		os.WriteFile(filepath.Join(table, "x.json.new"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(table, "stray.part"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(table, "other"), []byte("?"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	next, again := newDriver(t, dir)
	e.http = again.http
	if alarms := next.alarms.list(); !slices.Equal(alarms, []string{alarmText[alarmTable]}) {
		t.Errorf("alarms: %q", alarms)
	}

	for name := range broken {
		if _, err := os.Lstat(filepath.Join(table, name+brokenSuffix)); err != nil {
			t.Errorf("%s was not set aside: %v", name, err)
		}
	}

	for _, name := range []string{"x.json.new", "stray.part", "link.json", "fifo.json"} {
		if _, err := os.Lstat(filepath.Join(table, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s still exists: %v", name, err)
		}
	}

	c.print("one")
	c.stop()
	if diff := cmp.Diff([]string{"stdout F one"}, texts(t, c.log.String())); diff != "" {
		t.Error(diff)
	}
}

// TestUnreadableSpill damages or replaces a partial frame. It must be set aside, and the
// container's output must continue.
func TestUnreadableSpill(t *testing.T) {
	for name, damage := range map[string]func(file string) error{
		"huge":      func(file string) error { return os.WriteFile(file, make([]byte, batchSize+1), 0o600) },
		"directory": func(file string) error { return os.Mkdir(file, 0o700) },
		"link":      func(file string) error { return os.Symlink("/dev/zero", file) },
		"FIFO":      func(file string) error { return syscall.Mkfifo(file, 0o600) },
		"more than its frame": func(file string) error {
			return os.WriteFile(file, append([]byte{0, 0, 0, 2}, make([]byte, 100)...), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			d.Close()
			if err := damage(d.table.spillFile(&c.stream(d).entry)); err != nil {
				t.Fatal(err)
			}

			_, again := newDriver(t, dir)
			e.http = again.http
			c.print("one")
			c.stop()
			if got := texts(t, c.log.String()); !slices.Contains(got, "stdout F one") {
				t.Errorf("the log contains %q", got)
			}
		})
	}
}

// TestTableEntryIsChecked writes an entry under its proper name with a value forbidden in requests.
// The entry must be set aside.
func TestTableEntryIsChecked(t *testing.T) {
	for name, change := range map[string]func(e *entry, dir string){
		"FIFO elsewhere":     func(e *entry, dir string) { e.FIFO = filepath.Join(dir, "sub", filepath.Base(e.FIFO)) },
		"no container":       func(e *entry, _ string) { e.Container = "../../x" },
		"relative directory": func(e *entry, _ string) { e.Log.Directory = "pods" },
		"path out":           func(e *entry, _ string) { e.Log.Path = "../../outside" },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d, e := newDriver(t, dir)
			c := e.container("aa")
			c.start()
			d.Close()
			row := c.stream(d).entry
			file := d.table.entryFile(&row)
			change(&row, dir)
			b, err := json.Marshal(row)
			if err != nil {
				t.Fatal(err)
			}

			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}

			next, _ := newDriver(t, dir)
			if _, err := os.Lstat(file + brokenSuffix); err != nil || len(next.alarms.list()) != 1 {
				t.Errorf("the entry was not set aside: %v, alarms %q", err, next.alarms.list())
			}
		})
	}
}

// TestEngineStaysAway expects the entry of a container to be kept for the engine's successor, by
// any number of processes, but not forever.
func TestEngineStaysAway(t *testing.T) {
	dir := t.TempDir()
	rows := filepath.Join(dir, "table")
	if err := os.Mkdir(rows, 0o700); err != nil {
		t.Fatal(err)
	}

	orphan := entry{
		FIFO:      filepath.Join(dir, "fifo"),
		Container: model.ContainerID(idOf("x")),
		Log:       target{dir, "0.log"},
		Inode:     7,
	}
	if err := (&table{dir: rows}).save(&orphan); err != nil {
		t.Fatal(err)
	}

	for range 3 {
		d, _ := newDriver(t, dir)
		if o := d.orphans.find(model.ContainerID(idOf("x"))); o.Inode != 7 || o.Orphaned.IsZero() {
			t.Errorf("the orphan was not kept: %+v", o)
		}
		d.Close()
	}

	// Nothing else happens on the node.
	d, _ := newDriver(t, dir, func(c *Config) { c.SuccessorTimeout = time.Millisecond })
	var files []os.DirEntry
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		files, _ = os.ReadDir(rows)
		if len(files) == 0 && d.orphans.find(model.ContainerID(idOf("x"))).Inode == 0 {
			return
		}
	}

	t.Errorf("the entry was not removed: %v", files)
}
