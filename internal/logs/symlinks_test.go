package logs

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

func newContainer(t *testing.T) *model.Container {
	t.Helper()
	dir, id := t.TempDir(), strings.Repeat("beef", 16)
	file := filepath.Join(dir, "engine", "containers", id, id+"-json.log")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(file, []byte("line"), 0o600); err != nil {
		t.Fatal(err)
	}

	return &model.Container{
		ID:            model.ContainerID(id),
		Name:          "k8s_main",
		LogPath:       filepath.Join(dir, "pods", "web", "main", "0.log"),
		EngineLogPath: file,
	}
}

// newLinks returns symlinks for a container of newContainer.
func newLinks(c *model.Container) *symlinks {
	root := filepath.Join(c.EngineLogPath, "../../..")
	return &symlinks{
		log:        slog.New(slog.DiscardHandler),
		engineRoot: func() string { return root },
	}
}

func TestLinkAndUnlink(t *testing.T) {
	c := newContainer(t)
	s := newLinks(c)
	var first os.FileInfo
	for range 2 { // again after a restart of the daemon
		if err := s.started(t.Context(), c); err != nil {
			t.Fatal(err)
		}

		link, err := os.Lstat(c.LogPath)
		if err != nil || first != nil && !os.SameFile(first, link) {
			t.Errorf("the link was replaced: %v", err)
		}

		first = link
		if b, err := os.ReadFile(c.LogPath); err != nil || string(b) != "line" {
			t.Errorf("read of the link: %q, %v", b, err)
		}
	}

	if files, _ := filepath.Glob(filepath.Join(filepath.Dir(c.LogPath), "*")); len(files) != 1 {
		t.Errorf("files beside the link: %v", files)
	}

	other := *c
	other.EngineLogPath = "/other"
	if err := s.removed(t.Context(), &other); err != nil {
		t.Error(err)
	}

	if _, err := os.Lstat(c.LogPath); err != nil {
		t.Error("the removal of another container removed the link")
	}

	for range 2 {
		if err := s.removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}

	if _, err := os.Lstat(c.LogPath); !os.IsNotExist(err) {
		t.Errorf("the link still exists: %v", err)
	}
}

func TestARealFileIsNotReplaced(t *testing.T) {
	c := newContainer(t)
	s := newLinks(c)
	if err := os.MkdirAll(filepath.Dir(c.LogPath), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(c.LogPath, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}

	if err := s.started(t.Context(), c); err == nil {
		t.Error("started returned no error")
	}

	if err := s.removed(t.Context(), c); err != nil {
		t.Error(err)
	}

	if b, _ := os.ReadFile(c.LogPath); string(b) != "precious" {
		t.Errorf("the file was changed to %q", b)
	}
}

func TestNothingToLink(t *testing.T) {
	s := &symlinks{log: slog.New(slog.DiscardHandler)}
	for _, c := range []*model.Container{{}, {LogPath: filepath.Join(t.TempDir(), "x")}, {EngineLogPath: "/x"}} {
		if err := s.started(t.Context(), c); err != nil {
			t.Error(err)
		}
		if err := s.removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
}

// TestReopenOfALink renames the link like the kubelet, and expects the old lines under the new name
// and the new lines under the old one.
func TestReopenOfALink(t *testing.T) {
	c := newContainer(t)
	s := newLinks(c)
	if err := s.started(t.Context(), c); err != nil {
		t.Fatal(err)
	}

	engine, err := os.OpenFile(c.EngineLogPath, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()

	is := func(file, want string) {
		t.Helper()
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%s is %q, want %q; %v", filepath.Base(file), b, want, err)
		}
	}

	for i, old := range []string{"line", "line 1", "line 2"} {
		rotated := c.LogPath + ".2026010" + strconv.Itoa(i)
		if err := os.Rename(c.LogPath, rotated); err != nil {
			t.Fatal(err)
		}

		for range 2 { // again, as after a lost response
			if err := s.reopen(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			is(rotated, old)
			is(c.LogPath, "")
			is(c.EngineLogPath, "")
		}

		if st, err := os.Lstat(rotated); err != nil || !st.Mode().IsRegular() || st.Mode().Perm() != 0o640 {
			t.Errorf("rotated file: %v, %v; want a regular file with mode 0640", st, err)
		}

		if _, err := engine.WriteString("line " + strconv.Itoa(i+1)); err != nil {
			t.Fatal(err)
		}

		is(c.LogPath, "line "+strconv.Itoa(i+1))
	}

	if files, _ := filepath.Glob(filepath.Join(filepath.Dir(c.LogPath), ".*")); len(files) > 0 {
		t.Errorf("remaining temporary files: %v", files)
	}
	if err := s.reopen(t.Context(), c); err != nil { // without a renamed link
		t.Error(err)
	}

	is(c.LogPath, "line 3")
	if err := s.reopen(t.Context(), &model.Container{
		LogPath:   "/p/x",
		LogDriver: "journald",
	}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("driver without files: error %v, want FailedPrecondition", err)
	}

	removed := *c
	removed.EngineLogPath = filepath.Join(filepath.Dir(c.EngineLogPath), "removed")
	for _, err := range []error{os.Remove(c.LogPath), os.Symlink(removed.EngineLogPath, c.LogPath+".20260109")} {
		if err != nil {
			t.Fatal(err)
		}
	}

	if err := s.reopen(t.Context(), &removed); err == nil {
		t.Error("reopen returned no error for a removed engine file")
	}

	if _, err := os.Lstat(c.LogPath); !os.IsNotExist(err) {
		t.Errorf("a log was created despite the error: %v", err)
	}
}

// planted replaces a log with something else, as users with access to a pod's log directory can.
var planted = map[string]func(foreign, at string) error{
	"a link":      os.Symlink,
	"a hard link": os.Link,
	"a FIFO":      func(_, at string) error { return syscall.Mkfifo(at, 0o600) },
	"a directory": func(_, at string) error { return os.Mkdir(at, 0o755) },
}

// foreignFile creates another user's file, and checks at the end of the test that it is unchanged.
func foreignFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "foreign")
	if err := os.WriteFile(file, []byte("precious"), 0o604); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		b, err := os.ReadFile(file)
		st, statErr := os.Stat(file)
		if err != nil || statErr != nil || string(b) != "precious" || st.Mode() != 0o604 {
			t.Errorf("the foreign file is %q, %v; %v, %v", b, st, err, statErr)
		}
	})

	return file
}

// TestPlantedAtTheTemporaryName plants files at the temporary names of earlier releases. They must
// have no effect.
func TestPlantedAtTheTemporaryName(t *testing.T) {
	for name, plant := range planted {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t)
			s, foreign := newLinks(c), foreignFile(t)
			dir, short := filepath.Dir(c.LogPath), string(c.ID[:12])
			for _, err := range []error{
				os.MkdirAll(dir, 0o755),
				plant(foreign, filepath.Join(dir, ".0.log."+short)),
				plant(foreign, filepath.Join(dir, "0.log."+short)),
				s.started(t.Context(), c),
				os.Rename(c.LogPath, c.LogPath+".20260101"),
				s.reopen(t.Context(), c),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}

			if b, err := os.ReadFile(c.LogPath + ".20260101"); err != nil || string(b) != "line" {
				t.Errorf("the rotated file is %q, %v", b, err)
			}
		})
	}
}

// TestPlantedLinks expects a foreign link to be replaced at the log's path and ignored beside it.
func TestPlantedLinks(t *testing.T) {
	c := newContainer(t)
	s, foreign := newLinks(c), foreignFile(t)
	for _, err := range []error{
		os.MkdirAll(filepath.Dir(c.LogPath), 0o755),
		os.Symlink(foreign, c.LogPath),
		os.Symlink(foreign, c.LogPath+".20260101"),
		s.started(t.Context(), c),
		s.reopen(t.Context(), c),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	if target, err := os.Readlink(c.LogPath); err != nil || target != c.EngineLogPath {
		t.Errorf("the log links to %s, %v", target, err)
	}

	if target, err := os.Readlink(c.LogPath + ".20260101"); err != nil || target != foreign {
		t.Errorf("the foreign link has target %s, %v", target, err)
	}
}

// TestPlantedDirectories expects a link in the place of a directory not to be followed.
func TestPlantedDirectories(t *testing.T) {
	for _, up := range []string{"..", "../.."} {
		t.Run(up, func(t *testing.T) {
			c := newContainer(t)
			s, outside := newLinks(c), t.TempDir()
			link := filepath.Join(c.LogPath, up)
			if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
				t.Fatal(err)
			}

			if err := os.Symlink(outside, link); err != nil {
				t.Fatal(err)
			}

			if err := s.started(t.Context(), c); err == nil || !strings.Contains(err.Error(), link) {
				t.Errorf("started: %v", err)
			}

			if err := s.reopen(t.Context(), c); err == nil {
				t.Error("reopen: no error")
			}

			if err := s.removed(t.Context(), c); err != nil {
				t.Error(err)
			}

			if files, _ := os.ReadDir(outside); len(files) > 0 {
				t.Errorf("files outside: %v", files)
			}
		})
	}
}

// TestEngineLogElsewhere expects the engine's log path to be checked before the file is linked,
// copied or truncated.
func TestEngineLogElsewhere(t *testing.T) {
	foreign := foreignFile(t)
	good := newContainer(t)
	root := filepath.Join(good.EngineLogPath, "../../..")
	other := filepath.Join(root, "containers", strings.Repeat("cafe", 16), "x-json.log")
	dir := filepath.Dir(good.EngineLogPath)
	link, hard, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "hard"), filepath.Join(dir, "fifo")
	for _, err := range []error{
		os.Symlink(foreign, link),
		os.Link(foreign, hard),
		syscall.Mkfifo(fifo, 0o600),
		os.MkdirAll(filepath.Dir(other), 0o755),
		os.WriteFile(other, []byte("another's"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	for _, path := range []string{
		foreign, "/etc/shadow", "relative", other, root, dir + "/../../../../foreign", link, hard, fifo,
	} {
		t.Run(path, func(t *testing.T) {
			c := *good
			c.EngineLogPath = path
			s := newLinks(good)
			renamed := c.LogPath + ".20260101"
			if err := os.MkdirAll(filepath.Dir(c.LogPath), 0o755); err != nil {
				t.Fatal(err)
			}

			_ = os.Remove(renamed)
			if err := os.Symlink(path, renamed); err != nil {
				t.Fatal(err)
			}

			if err := s.reopen(t.Context(), &c); err == nil {
				t.Errorf("%s is accepted", path)
			}

			own := slices.Contains([]string{link, hard, fifo}, path)
			if err := s.started(t.Context(), &c); err == nil && !own {
				t.Errorf("%s is linked", path)
			}

			if target, err := os.Readlink(renamed); err != nil || target != path {
				t.Errorf("%s: the renamed link has target %q, %v", path, target, err)
			}
		})
	}

	s := newLinks(good)
	s.engineRoot = func() string { return "" }
	if err := s.started(t.Context(), good); !errdefs.IsUnavailable(err) {
		t.Errorf("without a known engine: error %v, want Unavailable", err)
	}
}
