package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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

// TestOwnPath expects a process to belong to the container only if a component of its path is the
// container's own. The result omits components below it.
func TestOwnPath(t *testing.T) {
	for path, want := range map[string]string{
		"/pods/c0ffee":                                  "/pods/c0ffee",
		"/pods/c0ffee/init.scope":                       "/pods/c0ffee",
		"/pods/c0ffee/a/../../../other":                 "",
		"/pods/c0ffee/c0ffee":                           "/pods/c0ffee",
		"/kube.slice/docker-c0ffee.scope":               "/kube.slice/docker-c0ffee.scope",
		"/kube.slice/docker-c0ffee.scope/x":             "/kube.slice/docker-c0ffee.scope",
		"/docker/0123/kube.slice/docker-c0ffee.scope":   "/docker/0123/kube.slice/docker-c0ffee.scope",
		"/kube.slice/docker-c0ffee.scope (deleted)":     "",
		"/kube.slice/crio-c0ffee.scope":                 "",
		"/kube.slice/docker-c0ffee.scope.d":             "",
		"/kube.slice/docker-c0ffee":                     "",
		"/pods/another":                                 "",
		"/pods/another/not-c0ffee":                      "",
		"/pods/another/c0ffee1":                         "",
		"/pods/\xff/c0ffee":                             "",
		"/pods/\x1b[31m/c0ffee":                         "",
		"/" + strings.Repeat("x", maxPath) + "/c0ffee":  "",
		"/pods/c0ffee/\xff":                             "/pods/c0ffee",
		"/pods/another/c0ffee\x01":                      "",
		"/../c0ffee":                                    "",
		"/..":                                           "",
		"/":                                             "",
		"":                                              "",
		"c0ffee":                                        "",
		"/" + strings.Repeat("deep/", 100) + "c0ffee/x": "/" + strings.Repeat("deep/", 100) + "c0ffee",
	} {
		t.Run(path, func(t *testing.T) {
			if got, ok := ownPath(path, id); ok != (want != "") || ok && got != want {
				t.Errorf("path %q: %q, want %q", path, got, want)
			}
		})
	}
}

func FuzzParseMembership(f *testing.F) {
	f.Add("12:hugetlb:/pods/c0ffee\n0::/pods/c0ffee\n")
	f.Add("0::/../c0ffee\n1:cpu,memory:/docker-c0ffee.scope/c0ffee")
	f.Add("0::\n:::\n\xff:memory:/c0ffee/..")
	f.Fuzz(func(t *testing.T, membership string) {
		var g Group
		ok := g.parseMembership(membership, id)
		for _, path := range append(slices.Clone(g.paths[:]), g.path) {
			if path == "" {
				continue
			}

			last := path[strings.LastIndexByte(path, '/')+1:]
			if !ok || !filepath.IsAbs(path) || slices.Contains(strings.Split(path, "/"), "..") || last != id &&
				last != "docker-"+id+".scope" {
				t.Errorf("%q: path %q", membership, path)
			}
		}
	})
}

// TestGroupOfChild reads the container's group even if its main process has moved to a group below
// it, as systemd does, and ignores that group's values.
func TestGroupOfChild(t *testing.T) {
	k := fixture(t, map[string]string{
		"proc/7/cgroup":                                "0::/pods/c0ffee/init.scope\n",
		"cgroup/pods/c0ffee/memory.current":            "100\n",
		"cgroup/pods/c0ffee/memory.stat":               "anon 50\n",
		"cgroup/pods/c0ffee/cpu.stat":                  "usage_usec 5\n",
		"cgroup/pods/c0ffee/cgroup.procs":              "\n",
		"cgroup/pods/c0ffee/init.scope/memory.current": "1\n",
		"cgroup/pods/c0ffee/init.scope/memory.stat":    "anon 1\n",
		"cgroup/pods/c0ffee/init.scope/cpu.stat":       "usage_usec 1\n",
		"cgroup/pods/c0ffee/init.scope/cgroup.procs":   "7\n",
	})

	g, err := k.FindGroup(7, id)
	must(t, err)
	defer g.Close()

	if u, err := g.Usage(); err != nil || u.Memory.Usage != 100 || u.CPU != 5000 || g.Path() != "/pods/c0ffee" {
		t.Errorf("%+v, %v of %s", u, err, g.Path())
	}

	if pids, err := g.PIDs(); err != nil || !slices.Equal(pids, []int{7}) {
		t.Errorf("processes %v, %v; want 7", pids, err)
	}
}

// TestLinksAreNotFollowed puts a link into a hierarchy. Real ones have no links.
func TestLinksAreNotFollowed(t *testing.T) {
	k := fixture(t, map[string]string{
		"proc/7/cgroup":                     "0::/pods/c0ffee\n",
		"cgroup/pods/other/memory.current":  "100\n",
		"cgroup/pods/other/memory.stat":     "anon 50\n",
		"cgroup/pods/other/memory.high":     "max\n",
		"cgroup/pods/other/cpu.stat":        "usage_usec 5\n",
		"cgroup/pods/other/cgroup.procs":    "8\n",
		"cgroup/pods/other/hugetlb.2MB.max": "4096\n",
	})

	must(t, os.Symlink("other", filepath.Join(k.Cgroup, "pods/c0ffee")))
	g, err := k.FindGroup(7, id)
	must(t, err)
	defer g.Close()

	if u, err := g.Usage(); err == nil {
		t.Errorf("usage: %+v", u)
	}

	if pids, err := g.PIDs(); err == nil {
		t.Errorf("processes: %v", pids)
	}

	if limits := g.Hugepages([]model.PageSize{"2MB"}); len(limits) != 0 {
		t.Errorf("limits: %v", limits)
	}

	if err := g.SetUnified(map[model.UnifiedKey]string{"memory.high": "1"}); err == nil ||
		read(t, filepath.Join(k.Cgroup, "pods/other/memory.high")) != "max\n" {
		t.Errorf("a limit of another group was written: %v", err)
	}
}

// TestOtherMountsAreNotEntered mounts another group over the container's, as is possible with all
// capabilities.
func TestOtherMountsAreNotEntered(t *testing.T) {
	k := fixture(t, map[string]string{
		"proc/7/cgroup":                        "0::/pods/c0ffee\n",
		"cgroup/pods/c0ffee/memory.high":       "max\n",
		"cgroup/pods/other/memory.high":        "max\n",
		"cgroup/pods/other/cgroup.procs":       "8\n",
		"cgroup/pods/c0ffee/child/memory.high": "max\n",
	})

	own, other := filepath.Join(k.Cgroup, "pods/c0ffee"), filepath.Join(k.Cgroup, "pods/other")
	must(t, unix.Mount(other, own, "", unix.MS_BIND, ""))
	defer func() { must(t, unix.Unmount(own, unix.MNT_DETACH)) }()

	g, err := k.FindGroup(7, id)
	must(t, err)
	defer g.Close()

	if err := g.SetUnified(map[model.UnifiedKey]string{"memory.high": "1"}); err == nil ||
		read(t, filepath.Join(other, "memory.high")) != "max\n" {
		t.Errorf("a limit of another group was written: %v", err)
	}

	if pids, err := g.PIDs(); err == nil {
		t.Errorf("processes: %v", pids)
	}
}

// TestReusedPID expects reads to stay with the process found by FindGroup.
func TestReusedPID(t *testing.T) {
	k, g := v1(t)
	must(t, os.WriteFile(process(k, 7, "status"), []byte("old"), 0o644))
	if b, err := g.ReadProcess("status", nil, 2); err != nil || string(b) != "ol" || !g.IsAlive() {
		t.Errorf("%q, %v, alive %v", b, err, g.IsAlive())
	}

	must(t, os.RemoveAll(process(k, 7, "")), os.MkdirAll(process(k, 7, ""), 0o755))
	must(t, os.WriteFile(process(k, 7, "status"), []byte("new"), 0o644),
		os.WriteFile(process(k, 7, "cgroup"), []byte("4:memory:/pods/other\n"), 0o644))
	must(t, os.WriteFile(process(k, 7, "oom_score_adj"), []byte("1"), 0o644))
	if b, err := g.ReadProcess("status", nil, 100); err == nil || g.IsAlive() {
		t.Errorf("after reuse of the PID: read %q, alive %v", b, g.IsAlive())
	}

	if n, err := g.OOMScoreAdj(); err == nil {
		t.Errorf("score %d of another process", n)
	}

	must(t, g.SetOOMScoreAdj(-9))
	if got := read(t, process(k, 7, "oom_score_adj")); got != "1" {
		t.Errorf("another process got the score %s", got)
	}
}

// TestProcessesOfRandomTrees counts the processes in groups of any shape with any names.
func TestProcessesOfRandomTrees(t *testing.T) {
	listedTime = time.Minute // a busy machine exceeds the usual limit
	t.Cleanup(func() { listedTime = maxListedTime })
	base := t.TempDir()
	n := 0
	rapid.Check(t, func(r *rapid.T) {
		n++
		k := Kernel{Proc: filepath.Join(base, "proc"), Cgroup: filepath.Join(base, fmt.Sprint(n))}
		root := filepath.Join(k.Cgroup, "pods/c0ffee")
		must(t, os.MkdirAll(root, 0o755))
		dirs, want := []string{root}, []int{}
		for range rapid.IntRange(0, 20).Draw(r, "groups") {
			name := string(rapid.SliceOfN(rapid.Byte(), 0, 10).Draw(r, "name"))
			name = "x" + strings.NewReplacer("/", "_", "\x00", "_").Replace(name)
			dir := filepath.Join(rapid.SampledFrom(dirs).Draw(r, "parent"), name)
			if os.Mkdir(dir, 0o755) == nil {
				dirs = append(dirs, dir)
			}
		}

		for i, dir := range dirs {
			content := ""
			for p := range rapid.IntRange(0, 5).Draw(r, "processes") {
				want = append(want, 100*i+p+1)
				content += fmt.Sprintln(100*i + p + 1)
			}

			rubbish := []string{"", "\n", "-5\n", "x\n", "99999999999\n", "12 13\n"}
			content += rapid.SampledFrom(rubbish).Draw(r, "rubbish")
			must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(content), 0o644))
		}

		must(t,
			os.MkdirAll(filepath.Join(k.Proc, "7"), 0o755),
			os.WriteFile(filepath.Join(k.Proc, "7/cgroup"), []byte("0::/pods/c0ffee\n"), 0o644))
		g, err := k.FindGroup(7, id)
		must(t, err)
		defer g.Close()

		got, err := g.PIDs()
		slices.Sort(got)
		slices.Sort(want)
		if err != nil || !slices.Equal(got, want) {
			r.Fatalf("%v, %v; want %v", got, err, want)
		}
	})
}

// TestBoundsOfProcesses creates more processes and more groups than the limits, and groups deeper
// than PATH_MAX.
func TestBoundsOfProcesses(t *testing.T) {
	group := func(t *testing.T) (*Group, string) {
		k := fixture(t, map[string]string{
			"proc/7/cgroup":                   "0::/pods/c0ffee\n",
			"cgroup/pods/c0ffee/cgroup.procs": "7\n",
		})

		g, err := k.FindGroup(7, id)
		must(t, err)
		t.Cleanup(g.Close)

		return g, filepath.Join(k.Cgroup, "pods/c0ffee")
	}

	bounded := func(t *testing.T, g *Group, want uint64) {
		t.Helper()
		began := time.Now()
		if n, err := g.Processes(); err != nil || n != want {
			t.Errorf("%d processes, %v; want %d", n, err, want)
		}

		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
	}

	t.Run("processes", func(t *testing.T) {
		g, dir := group(t)
		must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strings.Repeat("7\n", 4<<20)), 0o644))
		bounded(t, g, maxPIDs)
		if err := g.SetOOMScoreAdj(5); !errors.Is(err, ErrTooMany) || !errdefs.IsResourceExhausted(err) {
			t.Errorf("score for some processes: error %v, want ErrTooMany", err)
		}
	})

	t.Run("groups", func(t *testing.T) {
		g, dir := group(t)
		for i := range maxGroups + 100 {
			must(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755))
		}

		bounded(t, g, 1)
		if err := g.SetOOMScoreAdj(5); !errors.Is(err, ErrTooMany) {
			t.Errorf("score for some processes: error %v, want ErrTooMany", err)
		}
	})

	t.Run("depth", func(t *testing.T) {
		listedTime = time.Minute // a busy machine exceeds the usual limit
		t.Cleanup(func() { listedTime = maxListedTime })
		g, dir := group(t)
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		for range 1000 {
			must(t, unix.Mkdirat(fd, "a-group-in-a-group", 0o755))
			next, err := unix.Openat(fd, "a-group-in-a-group", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			must(t, err, unix.Close(fd))
			fd = next
		}

		procs, err := unix.Openat(fd, "cgroup.procs", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		must(t, err)
		_, err = unix.Write(procs, []byte("8\n"))
		must(t, err, unix.Close(procs), unix.Close(fd))
		bounded(t, g, 2)
	})
}
