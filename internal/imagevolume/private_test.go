package imagevolume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"cri-dockerd/internal/model"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	st, err := os.Lstat(path)
	must(t, err)
	return st.Mode().Perm()
}

// TestDirectoriesAreRootOnly verifies the mode of new directories, and that existing ones are
// repaired.
func TestDirectoriesAreRootOnly(t *testing.T) {
	base := t.TempDir()
	layer, run := filepath.Join(base, "layer"), filepath.Join(base, "run/volumes")
	must(t, os.Mkdir(layer, 0o755), os.MkdirAll(filepath.Join(run, testID.Hex()), 0o755),
		os.Mkdir(filepath.Join(run, emptyDir), 0o777))
	privately(t, func() {
		v := New(run)
		if err := v.Mount(testID, []string{layer}); err != nil {
			t.Error(err)
		}

		for _, dir := range []string{run, filepath.Join(run, emptyDir)} {
			if m := mode(t, dir); m != private {
				t.Errorf("%s has mode %o", dir, m)
			}
		}

		if err := v.Unmount(testID); err != nil {
			t.Error(err)
		}
	})

	must(t, os.Mkdir(filepath.Join(run, "not-an-image"), 0o700), os.Chmod(run, 0o755))
	if ids, err := New(run).List(); err != nil || len(ids) != 0 || mode(t, run) != private {
		t.Errorf("List: %v, %v, mode %o", ids, err, mode(t, run))
	}
}

// TestForeignDirectoriesAreRefused verifies that nothing is mounted or resolved in a directory of
// another user.
func TestForeignDirectoriesAreRefused(t *testing.T) {
	layer := t.TempDir()

	for name, plant := range map[string]func(run string) error{
		"another user's directory": func(run string) error {
			return errors.Join(os.Mkdir(run, 0o755), os.Chown(run, 1000, 1000))
		},
		"a link": func(run string) error { return os.Symlink(layer, run) },
		"a file": func(run string) error { return os.WriteFile(run, nil, 0o600) },
		"another user's directory of the image": func(run string) error {
			dir := filepath.Join(run, testID.Hex())
			return errors.Join(os.MkdirAll(dir, 0o755), os.Chown(dir, 1000, 1000))
		},
		"a link instead of the image's directory": func(run string) error {
			return errors.Join(os.Mkdir(run, 0o700), os.Symlink(layer, filepath.Join(run, testID.Hex())))
		},
	} {
		t.Run(name, func(t *testing.T) {
			run := filepath.Join(t.TempDir(), "volumes")
			must(t, plant(run))
			privately(t, func() {
				v := New(run)
				if err := v.Mount(testID, []string{layer, layer}); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("Mount: %v", err)
				}
				if path, err := v.Resolve(testID, ""); err == nil {
					t.Errorf("Resolve: %s", path)
				}
			})
		})
	}
}

// TestResolveStaysInside plants random links into an image. A resolved path lies inside the image,
// has no links, and refers to the image's file.
func TestResolveStaysInside(t *testing.T) {
	base := t.TempDir()
	secret := filepath.Join(base, "secret")
	must(t, os.WriteFile(secret, []byte("secret"), 0o600))
	n := 0
	part := rapid.SampledFrom([]string{"a", "b", "c", "..", ".", "", "link", "proc", "self", "root"})
	path := rapid.Map(rapid.SliceOfN(part, 1, 6), func(p []string) string { return strings.Join(p, "/") })
	rapid.Check(t, func(r *rapid.T) {
		n++
		layer, run := filepath.Join(base, fmt.Sprint("layer", n)), filepath.Join(base, fmt.Sprint("run", n))
		must(t, os.MkdirAll(filepath.Join(layer, "a/b/c"), 0o755), os.MkdirAll(filepath.Join(layer, "b/a"), 0o755))
		must(t, os.WriteFile(filepath.Join(layer, "a/b/file"), nil, 0o600))
		for range rapid.IntRange(0, 6).Draw(r, "links") {
			target := rapid.OneOf(
				path,
				rapid.Just("/proc/self/root"+base),
				rapid.Just(base),
				rapid.Just(secret),
				rapid.Just("../../../../.."+secret),
				rapid.Map(path, func(p string) string { return "/" + p }),
			).Draw(r, "target")

			at := rapid.SampledFrom([]string{"link", "c", "a/link", "a/c", "a/b/link", "b/link", "proc", "self",
				"root"}).Draw(r, "at")
			_ = os.Symlink(target, filepath.Join(layer, at))
		}

		sub := rapid.OneOf(path, rapid.Just("link"+secret)).Draw(r, "sub-path")
		privately(t, func() {
			v := New(run)
			if err := v.Mount(testID, []string{layer}); err != nil {
				t.Error(err)
				return
			}
			defer func() {
				if err := v.Unmount(testID); err != nil {
					t.Error(err)
				}
			}()

			got, err := v.Resolve(testID, sub)
			if err != nil {
				return
			}

			root := filepath.Join(run, testID.Hex())
			if got != root && !strings.HasPrefix(got, root+"/") {
				t.Errorf("%q leads to %s", sub, got)
			}
			if real, err := filepath.EvalSymlinks(got); err != nil || real != got {
				t.Errorf("%q resolves to %s, which has a link to %s, %v", sub, got, real, err)
			}
		})

		if t.Failed() {
			r.Fatal("see the errors above")
		}
	})
}

// TestResolveRefuses resolves special files, link loops, and paths in unmounted images.
func TestResolveRefuses(t *testing.T) {
	base := t.TempDir()
	layer := filepath.Join(base, "layer")
	must(t, os.Mkdir(layer, 0o755), unix.Mkfifo(filepath.Join(layer, "fifo"), 0o600),
		os.Symlink("loop", filepath.Join(layer, "loop")))
	must(t, unix.Mknod(filepath.Join(layer, "device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	privately(t, func() {
		v := New(filepath.Join(base, "run"))
		if path, err := v.Resolve(testID, ""); err == nil {
			t.Errorf("resolved %s without a mount", path)
		}

		if err := v.Mount(testID, []string{"relative"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("mount of a relative layer: %v", err)
		}

		if err := v.Mount(testID, []string{layer}); err != nil {
			t.Error(err)
		}

		for _, sub := range []string{"fifo", "device", "loop", strings.Repeat("x", 300), "nul\x00"} {
			if path, err := v.Resolve(testID, sub); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %s, %v", sub, path, err)
			}
		}

		if err := v.Unmount(testID); err != nil {
			t.Error(err)
		}

		must(t, os.Mkdir(filepath.Join(base, "run", testID.Hex()), 0o700))
		if path, err := v.Resolve(testID, ""); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("resolve in an unmounted image: %s, %v", path, err)
		}

		if path, err := v.Resolve(model.ImageID("sha256:"+strings.Repeat("0", 64)), ""); err == nil {
			t.Errorf("resolve in an unknown image: %s", path)
		}
	})
}
