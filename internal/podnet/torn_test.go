package podnet

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// reserved creates a directory of host-local and a configuration referring to it.
func reserved(t *testing.T, files map[string]string) (dir string, list *libcni.NetworkConfigList) {
	t.Helper()
	data := t.TempDir()
	dir = filepath.Join(data, "pods")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}

	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"pods","plugins":[
		{"type":"bridge","ipam":{"type":"host-local","dataDir":%q}},{"type":"portmap"}]}`, data))
	if err != nil {
		t.Fatal(err)
	}

	return dir, list
}

// TestTornReservations verifies that only addresses without an owner are released.
func TestTornReservations(t *testing.T) {
	dir, list := reserved(t, map[string]string{
		"10.1.0.2":           "",
		"10.1.0.3":           sandboxID + "\r\neth0",
		"fd00::2":            "",
		"last_reserved_ip.0": "",
		"notes":              "",
	})

	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	for name, create := range map[string]func(string) error{
		"10.1.0.4": func(path string) error { return os.Mkdir(path, 0o700) },
		"10.1.0.5": func(path string) error { return os.Symlink(outside, path) },
	} {
		if err := create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}

	a := &attacher{log: slog.New(slog.DiscardHandler)}
	if err := a.releaseTorn(t.Context(), list); err != nil {
		t.Fatal(err)
	}

	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}

	var remaining []string
	for _, e := range entries {
		remaining = append(remaining, e.Name())
	}

	const want = "10.1.0.3 10.1.0.4 10.1.0.5 last_reserved_ip.0 lock notes"
	if got := strings.Join(remaining, " "); got != want {
		t.Errorf("files %s, want %s", got, want)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}

	if err := a.releaseTorn(t.Context(), list); err != nil {
		t.Errorf("without the directory: %v", err)
	}
}

// TestReservationAtWork verifies that a locked reservation is kept: the plugin may be about to
// write the owner.
func TestReservationAtWork(t *testing.T) {
	dir, list := reserved(t, map[string]string{"10.1.0.2": "", "lock": ""})
	lock, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()

	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}

	a := &attacher{log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()

	if err := a.releaseTorn(ctx, list); err == nil {
		t.Error("the lock was ignored")
	}

	if _, err := os.Stat(filepath.Join(dir, "10.1.0.2")); err != nil {
		t.Error(err)
	}

	if err := os.WriteFile(filepath.Join(dir, "10.1.0.2"), []byte(sandboxID), 0o600); err != nil {
		t.Fatal(err)
	}

	lock.Close()
	if err := a.releaseTorn(t.Context(), list); err != nil {
		t.Error(err)
	}

	if _, err := os.Stat(filepath.Join(dir, "10.1.0.2")); err != nil {
		t.Error(err)
	}
}

// TestGCBesideABusyHostLocal verifies that locked reservations do not prevent GC.
func TestGCBesideABusyHostLocal(t *testing.T) {
	f := newFake(t)
	dir, _ := reserved(t, map[string]string{"10.1.0.2": "", "lock": ""})
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil,
		`{"cniVersion":"1.1.0","name":"pods","plugins":[{"type":"fake","ipam":{"type":"host-local","dataDir":%q}}]}`,
		filepath.Dir(dir)))
	if err != nil {
		t.Fatal(err)
	}

	lock, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()

	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}

	c := f.network(t, "1.1.0")
	if err := c.attach.collect(t.Context(), list); err == nil {
		t.Error("the busy lock is not reported")
	}

	if !strings.Contains(f.calls(), "GC ") {
		t.Errorf("no GC: %s", f.calls())
	}
}

// TestTornReservationsOfAFailedAdd simulates a killed plugin with an empty reservation.
func TestTornReservationsOfAFailedAdd(t *testing.T) {
	f := newFake(t)
	dir, _ := reserved(t, map[string]string{"10.1.0.2": ""})
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil,
		`{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"fake","ipam":{"type":"host-local","dataDir":%q}}]}`,
		filepath.Dir(dir)))
	if err != nil {
		t.Fatal(err)
	}

	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	f.mode("ADD-silent")
	if _, err := c.attach.add(t.Context(), list, p, nil); err == nil {
		t.Fatal("add succeeded")
	}

	if _, err := os.Stat(filepath.Join(dir, "10.1.0.2")); !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}

	if err := c.Del(t.Context(), p); err != nil {
		t.Error(err)
	}
}
