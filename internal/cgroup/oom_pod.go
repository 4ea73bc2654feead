package cgroup

import (
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// suspectTime is the longest time between the removal of a container's group, or the exit of a
	// container that was never watched, and the first sight of the kill that is attributed to it.
	suspectTime = 5 * time.Second
	// maxLost limits the remembered kills of a pod.
	maxLost = 64
	// settleTimeout limits the wait for the goroutine of Run.
	settleTimeout = time.Second
	// maxRecounts limits the reads of counters that change meanwhile.
	maxRecounts = 5
)

// podGroup is the group around the containers of a pod on cgroup v2. Its memory.events counts the
// kills in all groups below it, also in those that were removed since. systemd removes a
// container's group as soon as its last process has ended, often before anybody can read it. So
// kills that no container's own counter has belong to a container whose group was removed.
//
// Only Run uses it.
type podGroup struct {
	path  string
	fd    int         // memory.events
	users int         // watches of its containers
	known uint64      // kills before the first watch, and those found in the containers' own counters
	lost  uint64      // all others
	seen  []time.Time // when lost had grown, the last maxLost
}

// settle is a request to read the counters of a container that has ended.
type settle struct {
	c       *watched
	created time.Time
	killed  time.Time
	done    chan struct{}
}

// Settle reads the counters of a container of a pod that has ended, for a later Hit. killed is the
// time when its exit was reported, if a SIGKILL ended it that nobody is known to have requested, or
// else zero. On cgroup v2 such a container also counts as hit if its group was removed before its
// counter could be read, and a process was killed in a removed group of the pod at about that time.
// For a container that ended before it could be watched, that is any time between its creation and
// its exit: the engine may note its start after its end. Without a counter of the pod, as on cgroup
// v1, the kernel's log is searched. Settle returns after a second at the latest.
func (w *OOMWatcher) Settle(id, pod string, created, killed time.Time) {
	w.mu.Lock()
	c := w.watched[id]
	if c == nil { // it ended before it could be watched
		c = &watched{id: id, pod: pod, fd: -1}
	}

	done := make(chan struct{})
	w.settles = append(w.settles, settle{c, created, killed, done})
	w.wakeUp()
	w.mu.Unlock()

	select {
	case <-done:
	case <-time.After(settleTimeout):
	}
}

// settle executes a request of Settle.
func (w *OOMWatcher) settle(s settle) {
	defer close(s.done)
	c := s.c
	if c.fd >= 0 {
		w.count(c)
	}
	if c.fd >= 0 { // its own counter was read
		return
	}

	p := w.podGroupOf(c)
	if p != nil {
		w.recount(p)
	}

	switch _, hit := w.Hit(c.id); {
	case hit || s.killed.IsZero():
	case p == nil:
		w.searchLog(c)
	case slices.ContainsFunc(p.seen, s.isAt):
		w.recordUnread(c)
	}
}

// isAt reports whether a kill that was seen at a time in a removed group of the pod can have ended
// the container. The engine may report an exit many seconds after it, so the time of the report is
// the last resort.
func (s settle) isAt(seen time.Time) bool {
	if removed := s.c.removed; !removed.IsZero() {
		return seen.Sub(removed).Abs() <= suspectTime
	}
	return !seen.Before(s.created) && seen.Sub(s.killed) <= suspectTime
}

// recordUnread records the kill of a container whose counter was never read, watched or not.
func (w *OOMWatcher) recordUnread(c *watched) {
	w.mu.Lock()
	if c.number == 0 && w.watched[c.id] == nil {
		c = w.addLocked(c.id, c.pod)
	}
	w.mu.Unlock()

	if c != nil {
		w.recordKill(c)
	}
}

// podGroupOf returns the group around a container, or nil if none of its pod's containers was
// watched.
func (w *OOMWatcher) podGroupOf(c *watched) *podGroup {
	if c.around != nil {
		return c.around
	}

	w.mu.Lock()
	defer w.mu.Unlock()

	for _, other := range w.watched {
		if other.pod == c.pod && other.around != nil {
			return other.around
		}
	}

	return nil
}

// join finds the group around a container and reports whether no other container is watched in it.
// Without one, as on cgroup v1 and for a group at the root, it does nothing.
func (w *OOMWatcher) join(c *watched) (isNew bool) {
	around := path.Dir(c.group.path)
	if !c.group.V2() || around == "/" || around == "." {
		return false
	}

	p := w.pods[around]
	if p == nil {
		root, _ := c.group.locate(unified)
		fd, err := openBeneath(root, around+"/memory.events", unix.O_RDONLY)
		if err != nil {
			return false
		}

		p = &podGroup{path: around, fd: fd}
		p.known, _ = readKills(fd)
		w.pods[around] = p
		isNew = true
	}

	p.users++
	c.around = p

	return isNew
}

// leave undoes join.
func (w *OOMWatcher) leave(c *watched) {
	p := c.around
	if p == nil {
		return
	}

	c.around = nil
	if p.users--; p.users == 0 {
		_ = unix.Close(p.fd)
		delete(w.pods, p.path)
	}
}

// recount reads the counters of a pod and of its containers.
func (w *OOMWatcher) recount(p *podGroup) {
	for range maxRecounts {
		total, err := readKills(p.fd)
		if err != nil {
			return
		}

		known := p.known
		for _, c := range w.watchedIn(p) {
			w.count(c)
		}

		if p.known != known { // total may lack kills that the containers have
			continue
		}

		lost := total - min(total, known)
		if lost > p.lost {
			p.seen = append(p.seen[max(0, len(p.seen)+1-maxLost):], time.Now())
		}
		p.lost = lost

		return
	}
}

// watchedIn returns the containers of a pod that have a counter.
func (w *OOMWatcher) watchedIn(p *podGroup) (all []*watched) {
	w.mu.Lock()
	defer w.mu.Unlock()

	for _, c := range w.watched {
		if c.around == p && c.fd >= 0 {
			all = append(all, c)
		}
	}

	return all
}

// readKills reads the number of killed processes from an open memory.events.
func readKills(fd int) (uint64, error) {
	var b [512]byte
	n, err := unix.Pread(fd, b[:], 0)
	if err != nil {
		return 0, err
	}
	return parseOOMKills(b[:n]), nil
}
