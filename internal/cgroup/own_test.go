package cgroup

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// treeV1 returns a cgroup v1 tree with a group at dir and values derived from n. Tests give the
// whole container and the group of its first process different values.
func treeV1(dir string, n uint64) map[string]string {
	const pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"

	return map[string]string{
		"cgroup/cpuacct" + dir + "/cpuacct.usage":        fmt.Sprintln(n * 1000),
		"cgroup/memory" + dir + "/memory.usage_in_bytes": fmt.Sprintln(n * 4096),
		"cgroup/memory" + dir + "/memory.stat": fmt.Sprintf(
			"total_rss %d\ntotal_inactive_file 0\nhierarchical_memory_limit %d\n", n*4096, n<<20),
		"cgroup/memory" + dir + "/memory.oom_control":                  fmt.Sprintf("oom_kill %d\n", n),
		"cgroup/pids" + dir + "/pids.current":                          fmt.Sprintln(n),
		"cgroup/pids" + dir + "/pids.max":                              fmt.Sprintln(n * 10),
		"cgroup/hugetlb" + dir + "/hugetlb.2MB.limit_in_bytes":         fmt.Sprintln(n << 21),
		"cgroup/unified" + dir + "/cpu.pressure":                       pressure,
		"cgroup/systemd" + dir + "/cgroup.procs":                       "",
		"cgroup/blkio" + dir + "/blkio.throttle.io_serviced_recursive": "",
	}
}

func treeV2(dir string, n uint64) map[string]string {
	return map[string]string{
		"cgroup" + dir + "/cpu.stat":        fmt.Sprintf("usage_usec %d\n", n),
		"cgroup" + dir + "/memory.current":  fmt.Sprintln(n * 4096),
		"cgroup" + dir + "/memory.stat":     fmt.Sprintf("anon %d\ninactive_file 0\n", n*4096),
		"cgroup" + dir + "/memory.max":      fmt.Sprintln(n << 20),
		"cgroup" + dir + "/memory.events":   fmt.Sprintf("oom_kill %d\n", n),
		"cgroup" + dir + "/pids.current":    fmt.Sprintln(n),
		"cgroup" + dir + "/pids.max":        fmt.Sprintln(n * 10),
		"cgroup" + dir + "/hugetlb.2MB.max": fmt.Sprintln(n << 21),
	}
}

// TestOwnGroup expects a container's stats and limits to be those of its own group, wherever its
// first process has moved, as docker-in-docker (init) and systemd (init.scope) do. It covers both
// cgroup versions, the names of both cgroup drivers, and moves in only some hierarchies of cgroup
// v1.
func TestOwnGroup(t *testing.T) {
	const whole, inner = 500, 3
	for driver, own := range map[string]string{
		"cgroupfs":               "/docker/" + id,
		"cgroupfs with a parent": "/kubepods/burstable/pod1/" + id,
		"systemd":                "/system.slice/docker-" + id + ".scope",
		"systemd with a parent": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/docker-" +
			id + ".scope",
		"an engine in another one": "/docker/" + strings.Repeat("f", 64) + "/docker/" + id,
	} {
		for inside, below := range map[string]string{
			"stays":              "",
			"docker-in-docker":   "/init",
			"systemd":            "/init.scope",
			"deep":               "/system.slice/docker.service/x",
			"an engine inside":   "/docker/" + strings.Repeat("e", 64),
			"its own name again": "/docker/" + id,
		} {
			for version, c := range map[string]struct {
				tree       func(string, uint64) map[string]string
				membership string
			}{
				"v2": {treeV2, "0::%[1]s\n"},
				"v1": {treeV1, "9:name=systemd:%[1]s\n5:pids:%[1]s\n4:hugetlb:%[1]s\n" +
					"3:memory:%[1]s\n2:cpu,cpuacct:%[1]s\n0::%[1]s\n"},
				"v1, moved in one hierarchy": {treeV1, "9:name=systemd:%[1]s\n5:pids:%[2]s\n4:hugetlb:%[2]s\n" +
					"3:memory:%[2]s\n2:cpu,cpuacct:%[2]s\n"},
				"v1, moved out of most": {treeV1, "9:name=systemd:%[1]s\n5:pids:/\n4:hugetlb:/\n" +
					"3:memory:/elsewhere\n2:cpu,cpuacct:/\n1:blkio:%[2]s\n"},
			} {
				t.Run(driver+"/"+inside+"/"+version, func(t *testing.T) {
					files := map[string]string{"proc/7/cgroup": fmt.Sprintf(c.membership, own+below, own)}
					for name, content := range c.tree(own, whole) {
						files[name] = content
					}

					if below != "" {
						for name, content := range c.tree(own+below, inner) {
							files[name] = content
						}
					}

					g, err := fixture(t, files).FindGroup(7, id)
					if err != nil {
						t.Fatal(err)
					}
					defer g.Close()

					checkGroup(t, g, own, whole)
				})
			}
		}
	}
}

// checkGroup fails the test unless a group has this path and the stats of the whole container.
func checkGroup(t *testing.T, g *Group, own string, n uint64) {
	t.Helper()
	d, err := g.Details()
	if err != nil {
		t.Fatal(err)
	}

	if g.Path() != own || d.CPU != n*1000 || d.Memory.Usage != n*4096 || d.Memory.RSS != n*4096 ||
		*d.Memory.Limit != n<<20 {
		t.Errorf("group %s has details %+v", g.Path(), d)
	}

	if *d.Threads != n || *d.MaxThreads != n*10 || *d.OOMKills != n {
		t.Errorf("threads %d of %d, %d killed", *d.Threads, *d.MaxThreads, *d.OOMKills)
	}
	if got := g.Hugepages([]model.PageSize{"2MB"})["2MB"]; got != n<<21 {
		t.Errorf("huge pages are limited to %d", got)
	}
	if p := g.Parent(); p.Path() != filepath.Dir(own) {
		t.Errorf("the pod is at %s", p.Path())
	}
}
