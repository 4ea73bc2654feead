package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// killRecord returns a record of the kernel's log about a kill in a group.
func killRecord(group string) string {
	base := filepath.Base(group)
	return "6,1204,48890270186,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=" + base +
		",mems_allowed=0,oom_memcg=" + group + ",task_memcg=" + group + ",task=sh,pid=3033,uid=0\n SUBSYSTEM=x\n"
}

// TestLoggedKill attributes records of the kernel's log to containers.
func TestLoggedKill(t *testing.T) {
	a, b, outer := strings.Repeat("a", 64), strings.Repeat("b", 64), strings.Repeat("c", 64)
	of := func(group string) string { return killRecord("/kubepods/pod1" + group) }
	for name, c := range map[string]struct {
		log  string
		want bool
	}{
		"cgroupfs":               {of("/" + a), true},
		"systemd":                {of("/docker-" + a + ".scope"), true},
		"a group below":          {of("/docker-" + a + ".scope/init.scope"), true},
		"a node in a container":  {killRecord("/docker/" + outer + "/kubepods/pod1/" + a), true},
		"after other records":    {"6,1,2,-;oom-kill\n" + of("/"+b) + of("/"+a), true},
		"a shortage of the node": {strings.Replace(of("/"+a), "oom_memcg=/kubepods/pod1/"+a, "global_oom", 1), true},
		"another container":      {of("/" + b), false},
		"below another container": {
			of("/docker-" + b + ".scope/docker-" + a + ".scope"), false,
		},
		"a name in another container's path": {of("/" + b + "/x,task_memcg=/" + a), false},
		"a longer name":                      {of("/" + a + "a"), false},
		"of a program":                       {strings.Replace(of("/"+a), "6,", "14,", 1), false},
		"other text":                         {"6,1,2,-;sh: oom-kill: /" + a + "\n", false},
		"the name of a task":                 {strings.Replace(of("/"+b), "task=sh", "task=/"+a, 1), false},
		"half a record":                      {"6,1", false},
		"nothing":                            {"", false},
	} {
		file := filepath.Join(t.TempDir(), "kmsg")
		must(t, os.WriteFile(file, []byte(c.log), 0o600))
		k := Kernel{Log: file}
		if got := k.hasLoggedKill(a, func(id string) bool { return id == b }); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}

	if (Kernel{Log: "/no/log"}).hasLoggedKill(a, nil) {
		t.Error("a kill was found without a log")
	}
}

// TestSettleReadsTheLog settles containers that ended before they were watched.
func TestSettleReadsTheLog(t *testing.T) {
	a := strings.Repeat("a", 64)
	file := filepath.Join(t.TempDir(), "kmsg")
	must(t, os.WriteFile(file, []byte(killRecord("/kubepods/docker-"+a+".scope")), 0o600))

	for name, c := range map[string]struct {
		id     string
		killed time.Time
		want   bool
	}{
		"killed":            {a, time.Now(), true},
		"ended otherwise":   {a, time.Time{}, false},
		"another container": {strings.Repeat("b", 64), time.Now(), false},
	} {
		w, err := NewOOMWatcher(Kernel{Log: file}, func(string) {})
		must(t, err)
		defer w.Close()

		done := make(chan struct{})
		w.settle(settle{c: &watched{id: c.id, pod: "pod", fd: -1}, killed: c.killed, done: done})
		if _, hit := w.Hit(c.id); hit != c.want {
			t.Errorf("%s: hit %v, want %v", name, hit, c.want)
		}
	}
}

// TestLoggedKillOfTheKernel kills processes in real groups until the kernel logs one. It logs ten
// kills in five seconds, of all tests together.
func TestLoggedKillOfTheKernel(t *testing.T) {
	never := func(string) bool { return false }
	for range 10 {
		g := newOOMGroup(t, fmt.Sprintf("%016x", time.Now().UnixNano()), "") // the log has former runs
		if Host().hasLoggedKill(g.id, never) {
			t.Fatalf("a kill in %s is logged before it happened", g.id)
		}

		g.exceed(t)
		if Host().hasLoggedKill(g.id, never) {
			return
		}
		time.Sleep(time.Second)
	}

	t.Error("the kernel logged no kill")
}
