package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOOMOfRemovedGroups removes groups of the kernel before the watcher can read them. It expects
// the pod's counter to show the kill, and neither a requested kill nor one long after it to count.
func TestOOMOfRemovedGroups(t *testing.T) {
	w, hits := oomWatcher(t)
	hit, quiet, next := newOOMGroup(t, "a", ""), newOOMGroup(t, "b", ""), newOOMGroup(t, "c", "")
	if hit.v1 {
		return // TestOOMWatcherReadsLate
	}

	for _, g := range []*oomGroup{hit, quiet, next} {
		w.Watch(g.id, "pod", g.pid(), time.Now())
	}

	queue, _ := w.take()
	for _, c := range queue {
		w.update(c)
	}

	for _, g := range []*oomGroup{hit, quiet, next} {
		w.awaitWatch(t, g.id)
	}

	hit.exceed(t)
	hit.remove(t)
	quiet.end(t)
	quiet.remove(t)

	w.run(t)
	w.Settle(quiet.id, "pod", time.Now(), time.Time{})
	w.Settle(hit.id, "pod", time.Now(), time.Now().Add(time.Minute)) // reported late
	awaitHit(t, hits, hit.id)
	if _, hit := w.Hit(quiet.id); hit {
		t.Error("a container that ended otherwise is recorded as hit")
	}

	w.Settle(next.id, "pod", time.Now(), time.Now()) // its own counter can be read
	if _, hit := w.Hit(next.id); hit {
		t.Error("a container with a counter of zero is recorded as hit")
	}
}

// pod is a pod on files like those of cgroup v2.
type pod struct {
	*OOMWatcher
	t    *testing.T
	dir  string
	hits []string
}

func newPod(t *testing.T, containers ...string) *pod {
	t.Helper()
	p := &pod{t: t, dir: t.TempDir()}
	w, err := NewOOMWatcher(Kernel{Cgroup: p.dir}, func(id string) { p.hits = append(p.hits, id) })
	must(t, err)
	p.OOMWatcher = w
	t.Cleanup(func() {
		w.closeAll()
		_ = w.Close()
	})

	p.put("", 0)
	for _, id := range containers {
		p.put(id, 0)
		c := w.addLocked(id, "pod")
		c.group = &Group{kernel: w.kernel, path: "/pod/" + id, v2: true}
		w.join(c)
		c.fd, err = c.group.openCounter(unified, "memory.events")
		must(t, err)
	}

	return p
}

// put writes the counter of a container, or of the pod.
func (p *pod) put(id string, kills int) {
	p.t.Helper()
	dir := filepath.Join(p.dir, "pod", id)
	must(p.t, os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "memory.events"), fmt.Appendf(nil, "oom 1\noom_kill %d\n", kills), 0o644))
}

// remove makes a container's counter unreadable.
func (p *pod) remove(id string) {
	p.t.Helper()
	c := p.watched[id]
	must(p.t, unix.Close(c.fd))
	c.fd = 1 << 20
	p.countWatched(c)
}

// settled executes Settle and returns whether the container was hit.
func (p *pod) settled(id string, killed time.Time) bool {
	p.t.Helper()
	c := p.watched[id]
	if c == nil {
		c = &watched{id: id, pod: "pod", fd: -1}
	}

	known := len(p.watched)
	p.settle(settle{c, killed.Add(-time.Minute), killed, make(chan struct{})})
	_, hit := p.Hit(id)
	if !hit && len(p.watched) != known {
		p.t.Errorf("%s without a kill is in the table", id)
	}

	return hit
}

// TestPodGroup attributes the kills of a pod to its containers.
func TestPodGroup(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		do   func(p *pod)
		id   string
		kill time.Time
		want bool
	}{
		"lost": {func(p *pod) {
			p.put("", 1)
			p.remove("a")
		}, "a", now, true},
		"lost, ended otherwise": {func(p *pod) {
			p.put("", 1)
			p.remove("a")
		}, "a", time.Time{}, false},
		"two lost": {func(p *pod) {
			p.put("", 5)
			p.remove("a")
			p.remove("b")
			if !p.settled("b", now) {
				p.t.Error("the other one is not hit")
			}
		}, "a", now, true},
		"the other one's": {func(p *pod) {
			p.put("", 1)
			p.put("b", 1)
			p.remove("a")
		}, "a", now, false},
		"not watched": {func(p *pod) { p.put("", 1) }, "c", now, true},
		"no kill":     {func(p *pod) { p.remove("a") }, "a", now, false},
		"long ago": {func(p *pod) {
			p.put("", 1)
			p.remove("b")
			p.pods["/pod"].seen[0] = now.Add(-2 * suspectTime)
			p.remove("a")
		}, "a", now, false},
		"reported late": {func(p *pod) {
			p.put("", 1)
			p.remove("a")
		}, "a", now.Add(10 * suspectTime), true},
		"another kill long after it": {func(p *pod) {
			p.remove("a")
			p.watched["a"].removed = now.Add(-2 * suspectTime)
			p.put("", 1)
			p.remove("b")
		}, "a", now, false},
		"not watched, reported late": {func(p *pod) { p.put("", 1) }, "c", now.Add(10 * suspectTime), true},
		"not watched, created later": {func(p *pod) { p.put("", 1) }, "c", now.Add(2 * time.Minute), false},
		"own counter":                {func(p *pod) { p.put("", 1) }, "a", now, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, "a", "b")
			c.do(p)
			if got := p.settled(c.id, c.kill); got != c.want {
				t.Errorf("hit %v, want %v; reported %q", got, c.want, p.hits)
			}
		})
	}
}

// TestPodGroupIsReleased expects the pod's counter to be open while one of its containers is
// watched.
func TestPodGroupIsReleased(t *testing.T) {
	p := newPod(t, "a", "b")
	for i, id := range []string{"a", "b"} {
		if len(p.pods) != 1 || p.pods["/pod"].users != 2-i {
			t.Errorf("before the end of %s: %+v", id, p.pods)
		}

		p.Forget(id)
		queue, _ := p.take()
		for _, c := range queue {
			p.update(c)
		}
	}

	if len(p.pods) > 0 {
		t.Errorf("left: %+v", p.pods)
	}
}
