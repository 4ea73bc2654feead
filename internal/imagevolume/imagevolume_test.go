package imagevolume

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// privately runs a test in a temporary mount namespace.
func privately(t *testing.T, test func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}

		if err == nil {
			test()
		}

		done <- err
	}()

	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

const testID = model.ImageID(algorithm + "cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe")

// newLayers creates n layers below dir. The uppermost one has links.
func newLayers(t *testing.T, dir string, n int) (layers []string) {
	t.Helper()
	for i := range n {
		l := filepath.Join(dir, "a-directory-with-a-name-as-long-as-those-of-docker", fmt.Sprint("layer", i), "diff")
		if err := os.MkdirAll(filepath.Join(l, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}

		if err := os.WriteFile(filepath.Join(l, "sub", fmt.Sprint(i)), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}

		if err := os.WriteFile(filepath.Join(l, "same"), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}

		layers = append(layers, l)
	}

	for name, to := range map[string]string{
		"inside":  "/sub",
		"outside": "../../../../../../etc",
		"nowhere": "/no/such",
	} {
		if err := os.Symlink(to, filepath.Join(layers[0], name)); err != nil {
			t.Fatal(err)
		}
	}

	return layers
}

// TestMount mounts images with one and with many layers, resolves paths in them and unmounts them.
func TestMount(t *testing.T) {
	dir := t.TempDir()
	layers := newLayers(t, dir, 125)
	privately(t, func() {
		for _, n := range []int{1, 2, 125} {
			v, id := New(filepath.Join(dir, "run")), testID
			for range 2 {
				if err := v.Mount(id, layers[:n]); err != nil {
					t.Errorf("%d layers: %v", n, err)
					return
				}
			}

			for sub, want := range map[string]string{
				"": "", "same": "same", "sub/0": "sub/0", "inside": "sub", "inside/0": "sub/0",
				fmt.Sprint("sub/", n-1): fmt.Sprint("sub/", n-1), "./sub//": "sub",
			} {
				if got, err := v.Resolve(id, sub); err != nil || got != filepath.Join(dir, "run", testID.Hex(), want) {
					t.Errorf("Resolve %q: %s, %v", sub, got, err)
				}
			}

			// outside is /etc of the image
			for _, sub := range []string{"missing", "same/file", "nowhere", "outside", "sub/125"} {
				if got, err := v.Resolve(id, sub); !errdefs.IsNotFound(err) {
					t.Errorf("Resolve %q: %s, %v", sub, got, err)
				}
			}

			if b, err := os.ReadFile(filepath.Join(dir, "run", testID.Hex(), "same")); string(b) != "0" {
				t.Errorf("the file is not of the uppermost layer: %s, %v", b, err)
			}
			if err := os.WriteFile(filepath.Join(dir, "run", testID.Hex(), "same"), nil, 0o644); err == nil {
				t.Error("the mount is writable")
			}

			if ids, err := v.List(); err != nil || len(ids) != 1 || ids[0] != id {
				t.Errorf("List: %v, %v", ids, err)
			}

			for range 2 {
				if err := v.Unmount(id); err != nil {
					t.Error(err)
				}
			}

			if ids, err := v.List(); err != nil || len(ids) != 0 {
				t.Errorf("List: %v, %v", ids, err)
			}
		}

		v := New(filepath.Join(dir, "other"))
		if err := v.Mount(model.ImageID(algorithm+strings.Repeat("b", 64)),
			[]string{filepath.Join(dir, "nothing")}); err == nil {
			t.Error("mounting a missing layer returned no error")
		}

		if ids, err := v.List(); err != nil || len(ids) != 0 {
			t.Errorf("after a failed mount, List: %v, %v", ids, err)
		}
	})
}
