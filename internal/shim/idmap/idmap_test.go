package idmap

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
)

var users = annotation.UserNS{
	UIDs: annotation.IDs{First: 1 << 20, Size: 65536},
	GIDs: annotation.IDs{First: 1 << 21, Size: 65536},
}

func newStage(t *testing.T) *Stage {
	t.Helper()
	s, err := New("cri-dockerd-test-"+strings.ToLower(t.Name()), users)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.dir)); err != nil || len(mounts) > 0 {
			t.Errorf("%d mounts remain, %v", len(mounts), err)
		}
		if err := Clean(filepath.Base(s.dir)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
			t.Errorf("the stage remains: %v", err)
		}
	})

	return s
}

// inside runs a shell command as root of the user namespace and returns its output.
func inside(t *testing.T, command string) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", command)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: int(users.UIDs.First), Size: int(users.UIDs.Size)}},
		GidMappings: []syscall.SysProcIDMap{{HostID: int(users.GIDs.First), Size: int(users.GIDs.Size)}},
		Credential:  &syscall.Credential{NoSetGroups: true},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v", command, err)
	}

	return string(out)
}

func owners(t *testing.T, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return [2]uint32{st.Uid, st.Gid}
}

// upper returns the options for the layer of changes.
func upper(dir string) string {
	return "upperdir=" + dir + "/own/diff,workdir=" + dir + "/own/work,index=off"
}

// mountEngine mounts an overlay as an engine does, and returns the directory of its layers.
func mountEngine(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, d := range []string{"l1", "l2", "own/diff", "own/work", "own/merged"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"l1/low", "l2/deep"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte("1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	options := "lowerdir=" + dir + "/l1:" + dir + "/l2," + upper(dir)
	if err := unix.Mount("overlay", dir+"/own/merged", "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/own/merged", unix.MNT_DETACH) })

	return dir
}

// TestRootOfAnOverlay checks that root inside writes files of root into the engine's layer.
func TestRootOfAnOverlay(t *testing.T) {
	dir, s := mountEngine(t), newStage(t)
	if _, err := os.ReadFile(dir + "/own/merged/low"); err != nil {
		t.Fatal(err)
	}
	root, err := s.Root(dir + "/own/merged")
	if err != nil {
		t.Fatal(err)
	}

	got := inside(t, "cd "+root+" && stat -c %u:%g low deep && echo 2 >> low && mkdir new && echo > new/f && "+
		"chown 5:6 new/f && rm deep && cat low")
	if got != "0:0\n0:0\n1\n2\n" {
		t.Errorf("root of the namespace sees %q", got)
	}

	for file, want := range map[string][2]uint32{"low": {0, 0}, "new": {0, 0}, "new/f": {5, 6}} {
		if got := owners(t, dir+"/own/diff/"+file); got != want {
			t.Errorf("owners of %s in the layer: %v, want %v", file, got, want)
		}
	}
	if got := owners(t, root+"/new/f"); got != [2]uint32{users.UIDs.First + 5, users.GIDs.First + 6} {
		t.Errorf("owners of new/f through the mapped root: %v", got)
	}

	// The engine's own mount has cached that low is in a lower layer alone.
	if err := Refresh(dir + "/own/merged"); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(dir + "/own/merged/low"); err != nil || string(text) != "1\n2\n" {
		t.Errorf("the engine reads %q, %v", text, err)
	}

	// It works also for changes that need its work directory.
	if err := os.Chmod(dir+"/own/merged/new", 0o700); err != nil {
		t.Error(err)
	}
	if err := os.Rename(dir+"/own/merged/low", dir+"/own/merged/high"); err != nil {
		t.Error(err)
	}
}

func TestBind(t *testing.T) {
	s, dir := newStage(t), t.TempDir()
	if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}

	for _, source := range []string{dir, dir + "/f"} {
		target, err := s.Bind(source)
		if err != nil {
			t.Fatal(err)
		}
		if got := owners(t, target); got != [2]uint32{users.UIDs.First, users.GIDs.First} {
			t.Errorf("owners of %s: %v", source, got)
		}
	}

	if _, err := s.Bind("/proc"); err == nil || !strings.Contains(err.Error(), "ID-mapped") {
		t.Errorf("mapped /proc: %v, want the reason against it", err)
	}
	if _, err := s.Bind(dir + "/missing"); err == nil {
		t.Error("a missing source was mapped")
	}
}

func TestStageNames(t *testing.T) {
	for _, id := range []string{"", ".", "..", "a/b", "../a"} {
		if s, err := New(id, users); err == nil {
			t.Errorf("stage %s for %q", s.dir, id)
		}
	}
}

func TestParseLayers(t *testing.T) {
	dir := mountEngine(t)
	at := func(options string) *mountinfo.Info {
		return &mountinfo.Info{Mountpoint: dir + "/own/merged", FSType: "overlay", VFSOptions: options}
	}
	want := layers{
		lower:   []string{dir + "/l1", dir + "/l2"},
		upper:   dir + "/own/diff",
		work:    dir + "/own/work",
		options: []string{"index=off"},
	}
	for name, options := range map[string]string{
		"absolute": "rw,lowerdir=" + dir + "/l1:" + dir + "/l2," + upper(dir) + ",uuid=on",
		"relative": "rw,lowerdir=l1:l2,upperdir=own/diff,workdir=own/work,index=off",
		"appended": "rw,lowerdir+=" + dir + "/l1,lowerdir+=" + dir + "/l2," + upper(dir),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseLayers(at(options))
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(layers{})); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}

	for name, options := range map[string]string{
		"no layer":       "rw",
		"missing":        "rw,lowerdir=nowhere",
		"special":        `rw,lowerdir=/a\134:b`,
		"data":           "rw,lowerdir=/tmp,datadir+=/tmp",
		"other workdir":  "rw,lowerdir=/tmp,upperdir=/tmp/a/b,workdir=/tmp/c/d",
		"too many lower": "rw,lowerdir=" + strings.Repeat("/tmp:", maxLayers) + "/tmp",
	} {
		t.Run(name, func(t *testing.T) {
			if l, err := parseLayers(at(options)); err == nil {
				t.Errorf("layers %+v", l)
			}
		})
	}
}
