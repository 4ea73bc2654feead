package conformance

import (
	"archive/tar"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	breaker "cri-dockerd/test/proxy"
)

type linuxContext = runtimeapi.LinuxContainerSecurityContext

// imageGroupCases are users of a container with the groups of its first process, whose image has
// the user app (1000, primary group 1000) in the group 7777.
var imageGroupCases = []struct {
	name         string
	set          func(*linuxContext)
	uid, gid     int64
	supplemental []int64
}{
	{"root", func(*linuxContext) {}, 0, 0, []int64{0}},
	{"name", func(sc *linuxContext) { sc.RunAsUsername = "app" }, 1000, 1000, []int64{1000, 7777}},
	{"user", func(sc *linuxContext) { sc.RunAsUser = id64(1000) }, 1000, 1000, []int64{1000, 7777}},
	{"user and group", func(sc *linuxContext) {
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = id64(1000), id64(2000), []int64{1234}
	}, 1000, 2000, []int64{1234, 2000, 7777}},
	{"group of the image", func(sc *linuxContext) {
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = id64(1000), id64(7777), []int64{7777}
	}, 1000, 7777, []int64{7777}},
	{"unknown user", func(sc *linuxContext) { sc.RunAsUser = id64(3000) }, 3000, 0, []int64{0}},
}

func id64(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

// TestImageGroups checks that the first process and an exec have the groups of the request and
// those of the image (CRI SupplementalGroupsPolicy Merge), also with an explicit primary group, and
// that the status has the same (CRI ContainerUser).
func TestImageGroups(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for _, c := range imageGroupCases {
			t.Run(c.name, func(t *testing.T) {
				cc := n.containerConfig(sh("sleep 1000"))
				cc.Metadata.Name = strings.ReplaceAll(c.name, " ", "-")
				c.set(cc.Linux.SecurityContext)
				id := n.startConfig(t, pod, cfg, cc)
				for process, file := range statusFiles {
					if got := groupsIn(n.exec(t, id, "grep", "^Groups", file)); !slices.Equal(got, c.supplemental) {
						t.Errorf("groups of the %s: %v, want %v", process, got, c.supplemental)
					}
				}

				u := n.containerStatus(t, id).GetUser().GetLinux()
				groups := slices.Sorted(slices.Values(u.GetSupplementalGroups()))
				if u.GetUid() != c.uid || u.GetGid() != c.gid || !slices.Equal(groups, c.supplemental) {
					t.Errorf("user of the status: %v, want %d, %d, %v", u, c.uid, c.gid, c.supplemental)
				}
			})
		}
	})
}

// groupsIn returns the groups of a line of /proc/<pid>/status, sorted.
func groupsIn(line string) (out []int64) {
	for _, f := range strings.Fields(line)[1:] {
		if n, err := strconv.ParseInt(f, 10, 64); err == nil {
			out = append(out, n)
		}
	}

	slices.Sort(out)

	return slices.Compact(out)
}

// TestUsersOfUnusualImages creates containers of images whose files of users are links, missing, no
// files, or too large. Only the last is refused, and nothing is left of it.
func TestUsersOfUnusualImages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for i, c := range unusualImages {
			t.Run(c.name, func(t *testing.T) {
				ref := fmt.Sprintf("cri-test/users-%d:latest", i)
				engines.Import(t, n.own(t).Socket, ref, append(engines.BusyboxFiles(t), c.files...), "ENV PATH=/bin")
				cc := n.containerConfig(sh("sleep 1000"))
				cc.Metadata.Name, cc.Image.Image = fmt.Sprint("users", i), ref
				cc.Linux.SecurityContext.RunAsUser, cc.Linux.SecurityContext.RunAsGroup = id64(1000), id64(5)
				r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
					PodSandboxId:  pod,
					Config:        cc,
					SandboxConfig: cfg,
				})
				if left := n.docker(t, "ps", "-aq", "--filter", "name=cri-dockerd_accounts"); left != "" {
					t.Errorf("left: %s", left)
				}

				switch {
				case c.refusal != "":
					if err == nil || !strings.Contains(err.Error(), c.refusal) {
						t.Errorf("error %v, want one with %s", err, c.refusal)
					}
				case err != nil:
					t.Error(err)
				case c.groups != nil:
					n.startID(t, r.ContainerId)
					got := groupsIn(n.exec(t, r.ContainerId, "grep", "^Groups", "/proc/1/status"))
					if !slices.Equal(got, c.groups) {
						t.Errorf("groups %v, want %v", got, c.groups)
					}
				}
			})
		}
	})
}

// TestUsersOfAnImageOnASlowEngine: the engine takes most of a minute for the files of an image's
// users, and hangs on the removal of their reader. The container is created, and a recovery removes
// the reader.
func TestUsersOfAnImageOnASlowEngine(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)

	n := newNode(t, engines.V29)
	p := breaker.Start(t, filepath.Join(n.tempDir(t), "proxy.sock"), n.eng.Socket)
	n = n.withDaemon(t, "--docker-endpoint=unix://"+p.Socket)
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	p.Break(func(r *http.Request) breaker.Fault {
		switch {
		case strings.HasSuffix(r.URL.Path, "/archive"):
			return breaker.Fault{Delay: 20 * time.Second} // two files
		case r.Method == http.MethodDelete && strings.Contains(r.URL.Path, "cri-dockerd_accounts"):
			return breaker.Fault{Hang: true}
		}
		return breaker.Fault{}
	})

	cc := n.containerConfig(sh("sleep 1000"))
	cc.Linux.SecurityContext.RunAsUser, cc.Linux.SecurityContext.RunAsGroup = id64(1000), id64(5)
	r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod,
		Config:        cc,
		SandboxConfig: cfg,
	})
	if err != nil {
		t.Fatal(err)
	}

	n.startID(t, r.ContainerId)
	readers := func() string { return n.docker(t, "ps", "-aq", "--filter", "name=cri-dockerd_accounts") }
	if readers() == "" {
		t.Error("no reader remains, so its removal did not hang")
	}

	p.Break(nil)
	n.Kill(t)
	n.Start(t)
	eventually(t, "the reader is removed", func() bool { return readers() == "" })
	n.removePod(t, pod)
}

// unusualImages are files of users in images. A container with the user 1000 and the group 5 has
// these groups, if its engine starts it.
var unusualImages = []struct {
	name    string
	files   []engines.File
	groups  []int64
	refusal string
}{
	{
		name: "links",
		files: []engines.File{
			linkFile("etc/passwd", "../store/passwd"),
			linkFile("etc/group", "/store/group"),
			textFile("store/passwd", appUser),
			textFile("store/group", extraGroup),
		},
		groups: []int64{5, 7777},
	},
	{
		name: "links outside",
		files: []engines.File{
			linkFile("etc/passwd", "/../../store/passwd"),
			linkFile("etc/group", "../../../store/group"),
			textFile("store/passwd", appUser),
			textFile("store/group", extraGroup),
		},
		groups: []int64{5, 7777},
	},
	{name: "missing", groups: []int64{5}},
	{name: "link to itself", files: []engines.File{linkFile("etc/passwd", "passwd")}},
	{name: "directory", files: []engines.File{{Header: tar.Header{
		Name:     "etc/passwd/",
		Typeflag: tar.TypeDir,
		Mode:     0o755,
	}}}},
	{
		name:    "large",
		files:   []engines.File{textFile("etc/passwd", strings.Repeat(appUser, 17<<20/len(appUser)))},
		refusal: "/etc/passwd",
	},
}

const (
	appUser    = "app:x:1000:1000::/:\n"
	extraGroup = "extra:x:7777:app\n"
)

func linkFile(name, to string) engines.File {
	return engines.File{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}}
}

func textFile(name, text string) engines.File {
	return engines.File{Header: tar.Header{Name: name, Mode: 0o644}, Content: []byte(text)}
}
