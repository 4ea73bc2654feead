package imagefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"cri-dockerd/internal/safefs"
)

// usage walks the tree at dir to its end.
func usage(t testing.TB, ctx context.Context, dir string) (Usage, error) {
	t.Helper()
	root, err := safefs.OpenDir(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()

	w, err := newWalk(root, filepath.Base(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()

	_, err = w.run(ctx.Err, time.Hour)

	return w.usage(), err
}

// oracle measures an unchanging tree in a simple way.
func oracle(t testing.TB, root string) (u Usage) {
	t.Helper()
	seen := map[uint64]bool{}
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}

		info, err := d.Info()
		if err != nil {
			return err
		}

		st := info.Sys().(*syscall.Stat_t)
		if !seen[st.Ino] {
			seen[st.Ino] = true
			u.add(Usage{Bytes: uint64(st.Blocks) * 512, Inodes: 1})
		}

		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	return u
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// bait creates a directory outside of every layer with 64 MiB and 1,500 files.
func bait(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "large"))
	must(t, err, unix.Fallocate(int(f.Fd()), 0, 0, 64<<20), f.Close())
	for i := range 1500 {
		must(t, unix.Mknod(filepath.Join(dir, fmt.Sprint(i)), unix.S_IFREG|0o600, 0))
	}

	return dir
}

// newFile creates a file with size bytes. It never opens what exists: a FIFO with the same name
// would block it.
func newFile(path string, size int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}

	_, err = f.Write(make([]byte, size))

	return errors.Join(err, f.Close())
}

// TestUsageOfRandomTrees compares the walk with the oracle on random trees and names.
func TestUsageOfRandomTrees(t *testing.T) {
	outside := bait(t)
	base := t.TempDir()
	n := 0
	rapid.Check(t, func(r *rapid.T) {
		n++
		root := filepath.Join(base, fmt.Sprint(n))
		must(t, os.Mkdir(root, 0o755))
		dirs, files := []string{root}, []string{}
		name := rapid.Map(rapid.SliceOfN(rapid.Byte(), 1, 12), func(b []byte) string {
			return strings.NewReplacer("/", "_", "\x00", "_").Replace(string(b))
		})
		for range rapid.IntRange(0, 60).Draw(r, "entries") {
			path := filepath.Join(rapid.SampledFrom(dirs).Draw(r, "dir"), "x"+name.Draw(r, "name"))
			switch rapid.IntRange(0, 5).Draw(r, "kind") {
			case 0, 1:
				if os.Mkdir(path, 0o755) == nil {
					dirs = append(dirs, path)
				}

			case 2:
				_ = os.Symlink(outside, path)
			case 3:
				_ = unix.Mkfifo(path, 0o600)
			case 4:
				if len(files) > 0 {
					_ = os.Link(rapid.SampledFrom(files).Draw(r, "linked"), path)
				}

			default:
				if newFile(path, rapid.IntRange(0, 20000).Draw(r, "size")) == nil {
					files = append(files, path)
				}
			}
		}

		if got, err := usage(t, t.Context(), root); err != nil || got != oracle(t, root) {
			r.Fatalf("%+v, %v; want %+v", got, err, oracle(t, root))
		}

		must(t, os.RemoveAll(root))
	})
}

// TestUsageOfWideTree measures more subdirectories than one read returns, with files between them,
// and files with many names.
func TestUsageOfWideTree(t *testing.T) {
	root := t.TempDir()
	for i := range 1000 {
		dir := filepath.Join(root, fmt.Sprint("d", i))
		must(t, os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
		must(t, os.Link(filepath.Join(root, "d0/f"), filepath.Join(dir, "g")))
	}

	if got, err := usage(t, t.Context(), root); err != nil || got != oracle(t, root) {
		t.Errorf("%+v, %v; want %+v", got, err, oracle(t, root))
	}
}

// TestUsageOfDeepTree measures directories below PATH_MAX, reachable with mkdir and chdir.
func TestUsageOfDeepTree(t *testing.T) {
	const depth = 5_000
	root := t.TempDir()
	before := descriptors(t)
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	name := strings.Repeat("n", 200)
	for i := range depth {
		must(t, unix.Mkdirat(fd, name, 0o755), unix.Mknodat(fd, "file", unix.S_IFREG|0o600, 0))
		if i%1000 == 0 {
			must(t, unix.Mkdirat(fd, "beside", 0o755))
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err, unix.Close(fd))
		fd = next
	}

	must(t, unix.Close(fd))
	defer removeDeep(t, root, name)

	dir, err := safefs.OpenDir(filepath.Dir(root))
	must(t, err)
	w, err := newWalk(dir, filepath.Base(root))
	must(t, err, dir.Close())
	most := 0
	for ended := false; !ended; {
		ended, err = w.run(t.Context().Err, time.Millisecond)
		must(t, err)
		most = max(most, descriptors(t)-before)
	}

	if u := w.usage(); u.Inodes != 1+2*depth+depth/1000 || u.Partial {
		t.Errorf("%+v", u)
	}
	if most > 20 {
		t.Errorf("%d open descriptors during the walk, want at most 20", most)
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors were leaked", n-before)
	}
}

// removeDeep flattens and removes a deep tree. os.RemoveAll would take minutes.
func removeDeep(t *testing.T, root, name string) {
	t.Helper()
	for range 20_000 {
		child := filepath.Join(root, name)
		if err := os.Rename(filepath.Join(child, name), filepath.Join(root, "next")); err != nil {
			return // the end
		}
		must(t, os.RemoveAll(child), os.Rename(filepath.Join(root, "next"), child))
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// TestUsageWhileDirectoriesAreSwapped walks a layer while a process swaps directories and links,
// and moves directories. Files outside of the layer never count.
func TestUsageWhileDirectoriesAreSwapped(t *testing.T) {
	outside, root := bait(t), t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(root, "link")))
	for i := range 40 {
		must(t, os.MkdirAll(filepath.Join(root, fmt.Sprint("d", i), strings.Repeat("a/", 20)), 0o755))
		must(t, os.Symlink(outside, filepath.Join(root, fmt.Sprint("l", i))))
	}

	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()

	done := make(chan struct{})
	go func() {
		defer close(done)

		at := func(format string, a ...any) string { return filepath.Join(root, fmt.Sprintf(format, a...)) }
		for ctx.Err() == nil {
			i, j := rand.IntN(40), rand.IntN(40)
			_ = unix.Renameat2(unix.AT_FDCWD, at("d%d", i), unix.AT_FDCWD, at("l%d", j), unix.RENAME_EXCHANGE)
			_ = unix.Renameat2(unix.AT_FDCWD, at("d%d/a/a", i), unix.AT_FDCWD, at("l%d", j), unix.RENAME_EXCHANGE)
			_ = os.Rename(at("d%d/a/a/a", i), at("d%d/a/moved", j))
		}
	}()

	walks := 0
	for ctx.Err() == nil {
		u, err := usage(t, ctx, root)
		if err == nil {
			walks++
		}

		// A directory moved ahead of the walk counts again, so only the size reveals the bait.
		if u.Bytes > 32<<20 {
			t.Fatalf("files outside of the layer were counted: %+v", u)
		}
	}

	<-done
	if walks == 0 {
		t.Error("no walk completed")
	}
}

// TestUsageExcludesOtherMounts mounts file systems into a layer.
func TestUsageExcludesOtherMounts(t *testing.T) {
	root := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(root, "bind/x"), 0o755), os.Mkdir(filepath.Join(root, "tmpfs"), 0o755))
	outside := bait(t)
	must(t, unix.Mount(outside, filepath.Join(root, "bind"), "", unix.MS_BIND, ""))
	defer func() { must(t, unix.Unmount(filepath.Join(root, "bind"), unix.MNT_DETACH)) }()

	must(t, unix.Mount("tmpfs", filepath.Join(root, "tmpfs"), "tmpfs", 0, "size=1m"))
	defer func() { must(t, unix.Unmount(filepath.Join(root, "tmpfs"), unix.MNT_DETACH)) }()

	if u, err := usage(t, t.Context(), root); err != nil || u.Inodes != 1 || u.Partial {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestUsageHonoursContext(t *testing.T) {
	root := t.TempDir()
	for i := range 100 {
		must(t, os.Mkdir(filepath.Join(root, fmt.Sprint(i)), 0o755))
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := usage(t, ended, root); err == nil {
		t.Error("a cancelled walk returned no error")
	}
}

func BenchmarkUsage(b *testing.B) {
	root := b.TempDir()
	for d := range 200 {
		dir := filepath.Join(root, fmt.Sprint("a", d%10), fmt.Sprint("dir", d), "x/y")
		must(b, os.MkdirAll(dir, 0o755))
		for f := range 50 {
			must(b, os.WriteFile(filepath.Join(dir, fmt.Sprint("file", f)), []byte("x"), 0o644))
		}
	}

	b.ReportAllocs()
	for b.Loop() {
		if _, err := usage(b, b.Context(), root); err != nil {
			b.Fatal(err)
		}
	}
}
