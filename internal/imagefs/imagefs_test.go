package imagefs

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"cri-dockerd/internal/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// write creates a file of this size in KiB.
func write(t *testing.T, file string, kib int) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, make([]byte, kib<<10), 0o644); err != nil {
		t.Fatal(err)
	}
}

// container is the ID of a container.
const container = "00000000000000000000000000000000000000000000000000000000000000c1"

// note writes Docker's mount-id file of a container's layer.
func note(t *testing.T, root, id, layer string) {
	t.Helper()
	dir := filepath.Join(root, overlay2Mounts, id)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "mount-id"), []byte(layer),
		0o644)); err != nil {
		t.Fatal(err)
	}
}

func measureTwice(t *testing.T, m *Meter, s Store) Measurement {
	t.Helper()
	for range 2 {
		if _, err := m.measure(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}

	f, err := m.measure(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}

	return f
}

func within(u Usage, kib, inodes uint64) bool {
	return u.Inodes == inodes && u.Bytes >= kib<<10 && u.Bytes <= (kib+uint64(8*inodes))<<10 // including directories
}

func TestOverlay2(t *testing.T) {
	root := t.TempDir()
	in := func(parts ...string) string { return filepath.Join(append([]string{root, "overlay2"}, parts...)...) }
	write(t, in("image1", "diff", "a"), 100)
	write(t, in("image2", "diff", "b"), 200)
	write(t, in("c1", "diff", "w"), 50)
	write(t, in("c1", "work", "not counted"), 500)
	write(t, in("c1-init", "diff", "etc", "hosts"), 0)
	if err := os.MkdirAll(in("l"), 0o755); err != nil {
		t.Fatal(err)
	}

	note(t, root, container, "c1")
	if err := os.Link(in("image1", "diff", "a"), in("image1", "diff", "same")); err != nil {
		t.Fatal(err)
	}

	m, s := New(slog.New(slog.DiscardHandler)), Store{Driver: "overlay2", Root: root}
	f := measureTwice(t, m, s)
	if !within(f.Image, 300, 4) || !within(f.Container, 50, 5) || f.ImageDir != root || f.ContainerDir != root ||
		!within(f.Writable[container], 50, 2) {
		t.Errorf("%+v", f)
	}

	write(t, in("image1", "diff", "more"), 100) // never happens, so it is not detected
	write(t, in("c1", "diff", "more"), 100)
	write(t, in("image3", "diff", "half"), 10)
	first, err := m.measure(t.Context(), s)
	if err != nil || !within(first.Image, 310, 6) || !within(first.Container, 150, 6) {
		t.Errorf("after a write: %+v, %v", first, err)
	}

	write(t, in("image3", "diff", "rest"), 10) // the engine was still unpacking it
	if err := os.RemoveAll(in("image2")); err != nil {
		t.Fatal(err)
	}

	if f := measureTwice(t, m, s); !within(f.Image, 120, 5) {
		t.Errorf("after a pull and a removal: %+v", f)
	}
}

func TestContainerdStore(t *testing.T) {
	root := t.TempDir()
	base := filepath.Join(root, "containerd/daemon")
	snap := func(n string) string { return filepath.Join(base, snapshotter, n, "fs") }
	write(t, filepath.Join(base, content, "blobs/sha256/aa"), 30)
	write(t, filepath.Join(base, content, "ingest/half"), 500)
	write(t, filepath.Join(snap("1"), "a"), 100)
	write(t, filepath.Join(snap("7"), "w"), 60)
	m, s := New(slog.New(slog.DiscardHandler)), Store{Driver: "overlayfs", Root: root, Containerd: true}
	m.mounts = filepath.Join(root, "mountinfo")
	mounts := "36 35 0:31 / " + root + "/rootfs/overlayfs/" + container + " rw - overlay overlay rw,lowerdir=" +
		snap("1") + ",upperdir=" + snap("7") + ",workdir=" + base + "/w\n"
	if err := os.WriteFile(m.mounts, []byte("1 1 0:1 / / rw - ext4 /dev/x rw\n"+mounts), 0o644); err != nil {
		t.Fatal(err)
	}

	if f, ok := m.Complete(s, []model.ContainerID{container}); !ok || !within(f.Writable[container], 60, 2) ||
		f.ContainerDir != base {
		t.Errorf("before the first measurement: %+v, %v", f, ok)
	}

	f := measureTwice(t, m, s)
	if !within(f.Image, 130, 3) || !within(f.Container, 60, 2) || f.ImageDir != base || f.ContainerDir != base ||
		f.Writable[container] != f.Container {
		t.Errorf("%+v", f)
	}

	if err := os.WriteFile(m.mounts, nil, 0o644); err != nil { // the container has exited
		t.Fatal(err)
	}

	if f := measureTwice(t, m, s); !within(f.Container, 60, 2) {
		t.Errorf("after the container's exit: %+v", f)
	}
	if err := os.RemoveAll(filepath.Dir(snap("7"))); err != nil {
		t.Fatal(err)
	}

	if f := measureTwice(t, m, s); f.Container.Inodes != 0 || len(m.containers) != 0 {
		t.Errorf("after its removal: %+v", f)
	}
}

func TestUnknownLayout(t *testing.T) {
	m := New(slog.New(slog.DiscardHandler))
	for _, s := range []Store{{Driver: "zfs", Root: t.TempDir()},
		{Driver: "overlay2", Root: t.TempDir() + "/nothing"}} {
		if _, err := m.measure(t.Context(), s); err == nil {
			t.Errorf("%+v: no error", s)
		}
	}
}

// TestRead verifies that Read never blocks, returns the measurement of its store, and requests a
// new one if it is old.
func TestRead(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "overlay2/image/diff/a"), 100)
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		m := New(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		ctx, stop := context.WithCancel(t.Context())
		go m.Run(ctx)
		s := Store{Driver: "overlay2", Root: root}
		if f, ok := m.Read(s); ok {
			t.Errorf("before the first measurement: %+v", f)
		}

		synctest.Wait()
		f, ok := m.Read(s)
		if !ok || f.Image.Bytes < 100<<10 {
			t.Errorf("%+v, %v", f, ok)
		}

		synctest.Wait()
		if again, _ := m.Read(s); again.At != f.At {
			t.Error("a recent measurement was repeated")
		}

		time.Sleep(maxAge + time.Second)
		if old, _ := m.Read(s); old.At != f.At {
			t.Error("Read waited for a measurement")
		}

		synctest.Wait()
		if renewed, _ := m.Read(s); renewed.At == f.At {
			t.Error("an old measurement was not repeated")
		}

		for range 3 {
			if f, ok := m.Read(Store{Driver: "zfs", Root: root}); ok {
				t.Errorf("a measurement of another store: %+v", f)
			}
			time.Sleep(time.Second)
		}

		stop()
		synctest.Wait()
		if n := strings.Count(log.String(), "cannot measure"); n != 1 {
			t.Errorf("%d lines: %s", n, &log)
		}
	})
}

// TestComplete verifies that a container without a measurement is measured within the call, once.
func TestComplete(t *testing.T) {
	const other = "00000000000000000000000000000000000000000000000000000000000000c2"
	root := t.TempDir()
	write(t, filepath.Join(root, "overlay2/c1/diff/w"), 60)
	write(t, filepath.Join(root, "overlay2/c1-init/diff/etc"), 1)
	note(t, root, container, "c1")
	m, s := New(slog.New(slog.DiscardHandler)), Store{Driver: "overlay2", Root: root}

	f, ok := m.Complete(s, []model.ContainerID{container, other})
	if u := f.Writable[container]; !ok || !within(u, 60, 2) || f.ContainerDir != root || f.At.IsZero() ||
		len(f.Writable) != 1 {
		t.Errorf("before the first measurement: %+v, %v", f, ok)
	}

	write(t, filepath.Join(root, "overlay2/c1/diff/more"), 100)
	if f, _ := m.Complete(s, []model.ContainerID{container}); !within(f.Writable[container], 60, 2) {
		t.Errorf("the layer was walked again: %+v", f)
	}

	measured, err := m.measure(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}

	m.last, m.of = &measured, s
	write(t, filepath.Join(root, "overlay2/c2/diff/w"), 30)
	note(t, root, other, "c2")
	f, ok = m.Complete(s, []model.ContainerID{container, other})
	if !ok || !within(f.Writable[container], 160, 3) || !within(f.Writable[other], 30, 2) || f.At != measured.At {
		t.Errorf("with a container created after the measurement: %+v, %v", f, ok)
	}
	if len(measured.Writable) != 1 {
		t.Errorf("the shared measurement was changed: %+v", measured)
	}
	if f, ok := m.Complete(Store{Driver: "zfs", Root: root}, []model.ContainerID{container}); ok {
		t.Errorf("an unknown layout: %+v", f)
	}
}

// TestCompleteIsBounded verifies that a large layer is partially counted and the call returns.
func TestCompleteIsBounded(t *testing.T) {
	root := t.TempDir()
	for i := range 20 {
		write(t, filepath.Join(root, "overlay2/c1/diff", strconv.Itoa(i), "w"), 1)
	}

	note(t, root, container, "c1")
	l, err := overlay2Of(root, []model.ContainerID{container})
	defer l.close()

	if err != nil {
		t.Fatal(err)
	}

	w, err := newWalk(l.root, l.writable[container])
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()

	if ended, _ := w.run(nil, 0); ended || !w.usage().Partial {
		t.Errorf("a walk without time: %v, %+v", ended, w.usage())
	}
}
