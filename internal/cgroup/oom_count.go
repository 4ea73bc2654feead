package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// register makes the kernel report changes of a container's counter.
func (w *OOMWatcher) register(c *watched) (err error) {
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: c.number}
	if c.group.V2() {
		e.Events = unix.EPOLLPRI | unix.EPOLLET
		c.fd, err = c.group.openCounter(unified, "memory.events")
	} else {
		c.fd, err = c.group.openOOMEvents()
	}

	if err != nil {
		return err
	}

	raw, err := w.poll.SyscallConn()
	if err != nil {
		return err
	}

	add := func(poll uintptr) { err = unix.EpollCtl(int(poll), unix.EPOLL_CTL_ADD, c.fd, &e) }

	return errors.Join(raw.Control(add), err)
}

// openOOMEvents returns an eventfd. The kernel signals it when the group is out of memory.
func (g *Group) openOOMEvents() (int, error) {
	control, err := g.openCounter(memory, "memory.oom_control")
	if err != nil {
		return -1, err
	}
	defer unix.Close(control) //nolint:errcheck // it was only read

	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, err
	}

	if err := g.writeFile(memory, "cgroup.event_control", fmt.Sprint(fd, " ", control)); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}

	return fd, nil
}

// openCounter opens a file of the group for reading.
func (g *Group) openCounter(c controller, name string) (int, error) {
	root, path := g.locate(c)
	if root == "" {
		return -1, fs.ErrNotExist
	}
	return openBeneath(root, path+"/"+name, unix.O_RDONLY)
}

// countWatched does the same as count, and counts the kills around a container whose group has been
// removed, to know when they happened.
func (w *OOMWatcher) countWatched(c *watched) {
	if w.count(c); c.fd < 0 && c.around != nil {
		w.recount(c.around)
	}
}

// count reads the number of killed processes. If the kernel may be about to kill a process, it
// schedules another read.
func (w *OOMWatcher) count(c *watched) {
	kills, err := c.count()

	switch {
	case err != nil && c.group.V2():
		c.removed = time.Now()
		c.close()
	case err != nil && c.signals > 1: // the removal itself is one signal
		w.recordKill(c)
		c.close()
	case err != nil && c.pause > removalTimeout:
		c.close()
	case err != nil:
		w.scheduleCount(c)
	case kills > c.kills:
		if c.around != nil {
			c.around.known += kills - c.kills
		}
		c.kills = kills
		w.recordKill(c)
	case c.pause > 0 && c.pause <= recountLast:
		w.scheduleCount(c)
	}
}

// scheduleCount counts again after a pause, and doubles the pause.
func (w *OOMWatcher) scheduleCount(c *watched) {
	c.pause = max(c.pause, recountFirst)
	time.AfterFunc(c.pause, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.queueLocked(c)
	})
	c.pause *= 2
}

// count returns the number of killed processes of the container. It fails if the group has been
// removed.
func (c *watched) count() (uint64, error) {
	if c.group.V2() {
		return readKills(c.fd)
	}

	return c.group.countOOMKillsBelow()
}

// countOOMKillsBelow adds up the counters of a cgroup v1 group and all groups below it. A container
// may create such groups, and each counts only its own processes.
func (g *Group) countOOMKillsBelow() (sum uint64, err error) {
	root, path := g.locate(memory)
	dir, err := openBeneath(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return 0, err
	}

	f := os.NewFile(uintptr(dir), g.path)
	defer f.Close()

	add := func(fd int) error {
		var buf [512]byte
		b, err := readAt(fd, "memory.oom_control", buf[:0], len(buf))
		sum += parseOOMKills(b)
		return err
	}

	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return 0, err
	}

	if st.Nlink == 2 { // no groups below
		err := add(dir)
		return sum, err
	}

	w, err := safefs.NewWalker(f)
	if err != nil {
		return 0, err
	}
	defer w.Close()

	w.Dir = func(fd int, _ *unix.Stat_t) error { return ignoreEnded(add(fd)) }
	_, err = w.Walk(time.Now().Add(listedTime))

	return sum, err
}

// parseOOMKills returns the value of oom_kill in memory.oom_control or memory.events.
func parseOOMKills(b []byte) (kills uint64) {
	for len(b) > 0 {
		var line []byte
		line, b = cut(b, '\n')
		if name, value := cut(line, ' '); string(name) == "oom_kill" {
			kills, _ = strconv.ParseUint(string(trim(value)), 10, 64)
		}
	}

	return kills
}
