package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// oomGroup is a real group with a memory limit. A process in it, or in a group below it, exceeds
// the limit after a call of exceed.
type oomGroup struct {
	id     string
	v1     bool
	dir    string // in the memory hierarchy
	cmd    *exec.Cmd
	stdin  *os.File
	exited bool
}

// newOOMGroup creates a group. The ID of its container repeats name.
func newOOMGroup(t *testing.T, name, below string) *oomGroup {
	t.Helper()
	g := &oomGroup{id: strings.Repeat(name, 64)[:64]}
	base := fmt.Sprintf("/cri-dockerd-test-%d-%s", os.Getpid(), t.Name())
	move := realGroups(t, base+"/"+g.id+below)
	root, limit, swap := Host().Cgroup, "memory.max", "memory.swap.max"
	if _, err := os.Stat(filepath.Join(root, "memory/cgroup.event_control")); err == nil {
		g.v1, root, limit, swap = true, filepath.Join(root, "memory"), "memory.limit_in_bytes",
			"memory.memsw.limit_in_bytes"
	} else { // enable the controller in each group
		parts := strings.Split(base, "/")
		for i := range parts {
			must(t, os.WriteFile(filepath.Join(root, filepath.Join(parts[:i+1]...), "cgroup.subtree_control"),
				[]byte("+memory"), 0))
		}
	}

	g.dir = filepath.Join(root, base, g.id)
	must(t, os.WriteFile(filepath.Join(g.dir, limit), []byte("16777216"), 0))
	swapLimit := "0"
	if g.v1 {
		swapLimit = "16777216" // memory and swap together
	}

	_ = os.WriteFile(filepath.Join(g.dir, swap), []byte(swapLimit), 0) // fails without swap accounting
	r, w, err := os.Pipe()
	must(t, err)
	g.cmd, g.stdin = exec.Command("sh", "-c", "read go && exec tail /dev/zero"), w
	g.cmd.Stdin = r
	must(t, g.cmd.Start(), r.Close())
	move(g.cmd.Process.Pid)
	t.Cleanup(func() { g.end(t) })

	return g
}

func (g *oomGroup) pid() int { return g.cmd.Process.Pid }

// exceed makes the process exceed the limit and waits until it is killed.
func (g *oomGroup) exceed(t *testing.T) {
	t.Helper()
	_, err := g.stdin.WriteString("go\n")
	must(t, err)
	_ = g.cmd.Wait()
	g.exited = true
	must(t, g.stdin.Close())
	if ws := g.cmd.ProcessState.String(); ws != "signal: killed" {
		t.Fatalf("the process ended with %s", ws)
	}
}

// end stops the process without a shortage of memory.
func (g *oomGroup) end(t *testing.T) {
	t.Helper()
	if !g.exited {
		must(t, g.stdin.Close())
		_ = g.cmd.Wait()
		g.exited = true
	}
}

// remove removes the group, like the end of a container.
func (g *oomGroup) remove(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for { // the kernel releases a process after a moment
		entries, err := filepath.Glob(filepath.Join(g.dir, "*/cgroup.procs"))
		must(t, err)
		for _, e := range entries {
			_ = os.Remove(filepath.Dir(e))
		}

		err = os.Remove(g.dir)
		if err == nil || time.Now().After(deadline) {
			must(t, err)
			return
		}

		time.Sleep(time.Millisecond)
	}
}

// oomWatcher returns an idle watcher with a channel of its reports.
func oomWatcher(t *testing.T) (w *OOMWatcher, hits chan string) {
	t.Helper()
	hits = make(chan string, 10)
	w, err := NewOOMWatcher(Host(), func(id string) { hits <- id })
	must(t, err)
	return w, hits
}

// run runs a watcher until the test ends.
func (w *OOMWatcher) run(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-ended
	})
}

func awaitHit(t *testing.T, hits <-chan string, id string) {
	t.Helper()
	select {
	case got := <-hits:
		if got != id {
			t.Errorf("%s was hit, want %s", got, id)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("%s was not hit", id)
	}
}

// awaitWatch waits until the kernel reports events of a container.
func (w *OOMWatcher) awaitWatch(t *testing.T, id string) *watched {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		w.mu.Lock()
		c := w.watched[id]
		ready := c != nil && c.ready
		w.mu.Unlock()
		if ready {
			return c
		}
	}

	t.Fatalf("%s is not watched", id)

	return nil
}

// TestOOMWatcher uses real groups. It expects a container to be reported after an OOM kill, and to
// be remembered after the removal of its group. This includes a process in a group below the
// container's own. It expects no report for a container that ends otherwise.
func TestOOMWatcher(t *testing.T) {
	before := descriptors(t)
	w, hits := oomWatcher(t)
	t.Run("all", func(t *testing.T) {
		w.run(t)
		for _, g := range []*oomGroup{newOOMGroup(t, "a", ""), newOOMGroup(t, "b", "/system.slice")} {
			w.Watch(g.id, "pod", g.pid(), time.Now())
			w.awaitWatch(t, g.id)
			g.exceed(t)
			awaitHit(t, hits, g.id)
			g.remove(t)
			if at, hit := w.Hit(g.id); !hit || time.Since(at) > time.Minute {
				t.Errorf("after its end: hit at %v, hit %v", at, hit)
			}

			w.Forget(g.id)
			if _, hit := w.Hit(g.id); hit {
				t.Error("a forgotten container is still recorded as hit")
			}
		}

		quiet, last := newOOMGroup(t, "c", ""), newOOMGroup(t, "d", "")
		for _, g := range []*oomGroup{quiet, last} {
			w.Watch(g.id, "pod", g.pid(), time.Now())
			w.awaitWatch(t, g.id)
		}

		quiet.end(t)
		quiet.remove(t)
		last.exceed(t)
		awaitHit(t, hits, last.id) // and nothing before it
		if _, hit := w.Hit(quiet.id); hit {
			t.Error("a container that ended by itself is recorded as hit")
		}
	})

	w.mu.Lock()
	defer w.mu.Unlock()

	for _, c := range w.watched {
		if c.fd >= 0 {
			t.Errorf("%s is still open", c.id)
		}
	}

	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d afterwards", before, after)
	}
}

// TestOOMWatcherReadsLate removes a container's group before the watcher can read it. The kernel's
// signals distinguish a group out of memory from a group that was only removed.
func TestOOMWatcherReadsLate(t *testing.T) {
	w, hits := oomWatcher(t)
	hit, quiet := newOOMGroup(t, "a", ""), newOOMGroup(t, "b", "")
	if !hit.v1 {
		return // cgroup v2 does not signal a removal
	}

	for _, g := range []*oomGroup{hit, quiet} {
		w.Watch(g.id, "pod", g.pid(), time.Now())
	}

	queue, _ := w.take()
	for _, c := range queue {
		w.update(c)
	}

	for _, g := range []*oomGroup{hit, quiet} {
		w.awaitWatch(t, g.id)
	}

	hit.exceed(t)
	hit.remove(t)
	quiet.end(t)
	quiet.remove(t)

	w.run(t)
	awaitHit(t, hits, hit.id)
	c := w.watched[quiet.id]
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) { // until the removal is signalled
		w.mu.Lock()
		at := c.hitAt
		w.mu.Unlock()
		if !at.IsZero() {
			t.Fatal("a container that ended by itself is recorded as hit")
		}
		if time.Now().After(deadline) || w.signalsOf(c) == 1 {
			break
		}
	}

	if n := w.signalsOf(c); n != 1 {
		t.Errorf("%d signals of a removal", n)
	}
}

func (w *OOMWatcher) signalsOf(c *watched) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return c.signals
}

// TestOOMBeforeWatch expects a kill before the start of the watch to count for a young container
// only.
func TestOOMBeforeWatch(t *testing.T) {
	for name, c := range map[string]struct {
		age time.Duration
		hit bool
	}{"young": {0, true}, "old": {time.Hour, false}} {
		t.Run(name, func(t *testing.T) {
			g := newOOMGroup(t, "a", "")
			child := exec.Command("sh", "-c", "echo $$ > "+g.dir+"/cgroup.procs && exec tail /dev/zero")
			_ = child.Run()
			if s := child.ProcessState.String(); s != "signal: killed" {
				t.Fatalf("the child ended with %s", s)
			}

			w, hits := oomWatcher(t)
			w.run(t)
			w.Watch(g.id, "pod", g.pid(), time.Now().Add(-c.age))
			w.awaitWatch(t, g.id)
			if c.hit {
				awaitHit(t, hits, g.id)
			}

			g.exceed(t) // and again
			if !c.hit {
				awaitHit(t, hits, g.id)
			}
		})
	}
}

// TestOOMOfV2 reads the counter of cgroup v2.
func TestOOMOfV2(t *testing.T) {
	k, g := v2(t)
	events := filepath.Join(k.Cgroup, "pods/c0ffee/memory.events")
	put := func(kills int) {
		must(t, os.WriteFile(events, fmt.Appendf(nil, "low 0\nhigh 0\nmax 4\noom %d\noom_kill %d\noom_group_kill 0\n",
			kills, kills), 0o644))
	}

	put(0)
	var hits []string
	w, err := NewOOMWatcher(k, func(id string) { hits = append(hits, id) })
	must(t, err)
	defer w.poll.Close()

	fd, err := g.openCounter(unified, "memory.events")
	must(t, err)
	c := &watched{id: id, group: g, fd: fd}
	w.count(c)
	if len(hits) > 0 || c.fd < 0 {
		t.Errorf("hit without a kill: %v", hits)
	}

	put(1)
	w.count(c)
	w.count(c)
	if len(hits) != 1 || c.kills != 1 || c.hitAt.IsZero() {
		t.Errorf("after a kill: hits %v, state %+v", hits, c)
	}

	must(t, unix.Close(c.fd))
	c.fd = 1 << 20 // like the file of a removed group, it cannot be read
	w.count(c)
	if c.fd >= 0 || len(hits) != 1 {
		t.Errorf("after the removal: %v, %+v", hits, c)
	}
}

// TestOOMWatcherIsBounded expects containers beyond the limit to be ignored.
func TestOOMWatcherIsBounded(t *testing.T) {
	w, _ := oomWatcher(t)
	defer w.poll.Close()

	for i := range maxWatched + 5 {
		w.Watch(fmt.Sprint(i), "pod", 1, time.Now())
	}

	if len(w.watched) != maxWatched {
		t.Errorf("%d containers are watched, want maxWatched", len(w.watched))
	}

	w.Forget("7")
	w.Watch("another", "pod", 1, time.Now())
	w.Watch("8", "pod", 2, time.Now()) // a new process
	if len(w.watched) != maxWatched || w.watched["another"] == nil || w.watched["8"].pid != 2 ||
		len(w.numbers) != maxWatched {
		t.Errorf("after one was forgotten: %d containers, %d numbers", len(w.watched), len(w.numbers))
	}
}
