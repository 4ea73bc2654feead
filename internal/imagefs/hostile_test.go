package imagefs

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// TestSlowLayerDelaysNoOther measures a container with many files beside others. The others are
// measured at once, and the usage of the large one grows until the walk is complete.
func TestSlowLayerDelaysNoOther(t *testing.T) {
	root := t.TempDir()
	large := filepath.Join(root, "overlay2/c1/diff")
	for i := range 500 {
		must(t, os.MkdirAll(filepath.Join(large, fmt.Sprint(i), "x"), 0o755))
	}

	write(t, filepath.Join(root, "overlay2/c1-init/diff/etc"), 0)
	other := strings.Repeat("e", 64)
	write(t, filepath.Join(root, "overlay2/c2/diff/f"), 100)
	write(t, filepath.Join(root, "overlay2/c2-init/diff/etc"), 0)
	note(t, root, container, "c1")
	note(t, root, other, "c2")

	m, s := New(slog.New(slog.DiscardHandler)), Store{Driver: "overlay2", Root: root}
	m.slice = 0
	defer m.forget(nil)

	f, err := m.measure(t.Context(), s)
	must(t, err)
	if u := f.Writable[model.ContainerID(other)]; !within(u, 100, 2) || u.Partial {
		t.Errorf("the other container: %+v", u)
	}

	first := f.Writable[container]
	if !first.Partial || first.Inodes == 0 || first.Inodes > 900 {
		t.Errorf("the large container after one slice: %+v", first)
	}

	for i := 0; f.Writable[container].Partial; i++ {
		if i == 1000 {
			t.Fatal("the large layer is never measured completely")
		}
		f, err = m.measure(t.Context(), s)
		must(t, err)
	}

	if got := f.Writable[container]; got != oracle(t, large) {
		t.Errorf("%+v, want %+v", got, oracle(t, large))
	}

	must(t, os.RemoveAll(filepath.Join(root, "overlay2/c1")), os.RemoveAll(filepath.Join(root, "overlay2/c1-init")))
	if f, err = m.measure(t.Context(), s); err != nil || len(f.Writable) != 1 || m.paused() != 0 {
		t.Errorf("after its removal: %+v, %v", f, err)
	}
}

// TestSlowLayersShareDescriptors measures more slow layers than maxPaused.
func TestSlowLayersShareDescriptors(t *testing.T) {
	root := t.TempDir()
	const layers = maxPaused + 20
	for l := range layers {
		for i := range 30 {
			must(t, os.MkdirAll(filepath.Join(root, "overlay2", fmt.Sprint("c", l), "diff", fmt.Sprint(i), "x"), 0o755))
		}
		must(t, os.MkdirAll(filepath.Join(root, "overlay2", fmt.Sprint("c", l, "-init"), "diff"), 0o755))
	}

	m, s := New(slog.New(slog.DiscardHandler)), Store{Driver: "overlay2", Root: root}
	m.slice = 0
	defer m.forget(nil)

	for i := 0; ; i++ {
		f, err := m.measure(t.Context(), s)
		must(t, err)
		if m.paused() > maxPaused {
			t.Fatalf("%d walks are paused", m.paused())
		}

		if !f.Container.Partial {
			if f.Container.Inodes != layers*62 {
				t.Errorf("%+v", f.Container)
			}
			return
		}

		if i == 1000 {
			t.Fatal("not all layers are measured")
		}
	}
}

// TestLayoutIgnoresForeignNames verifies that neither links in the place of layers nor invalid
// mount IDs lead the walk out of the store.
func TestLayoutIgnoresForeignNames(t *testing.T) {
	root, outside := t.TempDir(), bait(t)
	must(t, os.MkdirAll(filepath.Join(root, "overlay2/c1-init"), 0o755), os.MkdirAll(filepath.Join(root, "overlay2/c1"),
		0o755))
	must(t, os.Symlink(outside, filepath.Join(root, "overlay2/c1/diff")),
		os.Symlink(filepath.Dir(outside), filepath.Join(root, "overlay2/c2")))
	note(t, root, container, "../../"+outside)
	note(t, root, "no-container-id", "c1")
	m := New(slog.New(slog.DiscardHandler))
	f := measureTwice(t, m, Store{Driver: "overlay2", Root: root})
	if f.Image.Bytes+f.Container.Bytes != 0 || len(f.Writable) != 0 {
		t.Errorf("%+v", f)
	}
}

const upper = "/data/containerd/daemon/" + snapshotter + "/7/fs"

// mounted returns a line of mountinfo.
func mounted(point, fs, options string) string {
	return "36 35 0:31 / " + point + " rw,relatime shared:1 - " + fs + " none " + options + "\n"
}

func TestUpperDirsAcceptsDockerMountsOnly(t *testing.T) {
	own := "/data/" + rootfs + "/" + container
	base, snapshots := upperDirs("/data",
		[]byte(mounted(own, "overlay", "rw,lowerdir=/x,upperdir="+upper+",workdir=/y")))
	if base != "/data/containerd/daemon" || snapshots[container] != "7" {
		t.Errorf("%s, %v", base, snapshots)
	}

	for name, line := range map[string]string{
		"a pod's directory":                 mounted("/pods/upperdir="+upper, "ext4", "rw"),
		"an overlay elsewhere":              mounted("/pods/"+container, "overlay", "rw,upperdir="+upper),
		"an overlay below the container's":  mounted(own+"/x", "overlay", "rw,upperdir="+upper),
		"another file system":               mounted(own, "fuse", "rw,upperdir="+upper),
		"not a container ID":                mounted("/data/"+rootfs+"/x", "overlay", "rw,upperdir="+upper),
		"an upper directory elsewhere":      mounted(own, "overlay", "rw,upperdir=/etc"),
		"a path traversal":                  mounted(own, "overlay", "rw,upperdir=/data/../etc/"+snapshotter+"/7/fs"),
		"a snapshot without a number":       mounted(own, "overlay", "rw,upperdir=/data/"+snapshotter+"/../../7/fs"),
		"another option with the same text": mounted(own, "overlay", "rw,lowerdir=upperdir="+upper),
		"a mount point with line feeds":     mounted(`/pods/x\012`+own, "overlay", "rw,upperdir="+upper),
	} {
		t.Run(name, func(t *testing.T) {
			if base, snapshots := upperDirs("/data", []byte(line)); base != "" || len(snapshots) != 0 {
				t.Errorf("accepted %q, %v", base, snapshots)
			}
		})
	}
}

func FuzzUpperDirs(f *testing.F) {
	f.Add([]byte(mounted("/data/"+rootfs+"/"+container, "overlay", "rw,upperdir="+upper)))
	f.Add([]byte("36 35 0:31 / /x rw - overlay none"))
	f.Add([]byte("\x00\xff - - overlay upperdir=\n"))
	f.Fuzz(func(t *testing.T, mounts []byte) {
		base, snapshots := upperDirs("/data", mounts)
		if (base == "") != (len(snapshots) == 0) || base != "" &&
			(!filepath.IsAbs(base) || filepath.Clean(base) != base) {
			t.Errorf("%q, %v", base, snapshots)
		}

		for id, n := range snapshots {
			if _, err := model.ParseContainerID(string(id)); err != nil || strings.ContainsAny(n, "/.") {
				t.Errorf("%q: %q", id, n)
			}
		}
	})
}
