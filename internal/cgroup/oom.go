package cgroup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// maxWatched bounds the containers that OOMWatcher watches, with one descriptor each.
const maxWatched = 4096

const (
	// The counter is read again after recountFirst, twice that, and so on until recountLast: the
	// kernel reports that memory is out a moment before it kills.
	recountFirst = time.Millisecond
	recountLast  = 100 * time.Millisecond
	// removalTimeout is how long the kernel may take to signal the removal of a group.
	removalTimeout = 10 * time.Second
	// recentStart is how young a container is in which a kill that happened before its watch began
	// counts as a hit. In an older one the daemon was restarted since, and the kill may be old.
	recentStart = 10 * time.Second
)

// OOMWatcher learns from the kernel in which containers the OOM killer has killed a process. A
// container's group is removed as soon as the container ends, and its counters with it, so they are
// read when the kernel reports a change:
//
//   - cgroup v1: memory.oom_control signals an eventfd when the group or one above it is out of
//     memory, and once more when the group is removed; its oom_kill counts the processes of the
//     group alone that were killed (Documentation/admin-guide/cgroup-v1/memory.rst, section 10).
//   - cgroup v2: memory.events can be polled; its oom_kill includes the groups below
//     (Documentation/admin-guide/cgroup-v2.rst).
//
// These are the sources of containerd's own OOM events. A group that was removed before it could be
// read counts as hit if v1 had signalled more than its removal.
//
// It is safe for concurrent use. Run does all the work; the other methods only note or look up.
type OOMWatcher struct {
	kernel Kernel
	hit    func(id string) // called when a container was hit, without a lock

	wake chan struct{} // an element when there is something to add
	poll *os.File      // of epoll; its events have the ID's number

	mu      sync.Mutex // guards the rest
	watched map[string]*watched
	numbers map[int32]*watched // by the number that epoll has of them
	last    int32
	queue   []*watched
}

// watched is a container that is watched.
type watched struct {
	id      string
	pid     int
	started time.Time
	number  int32

	// Guarded by OOMWatcher.mu.
	hitAt     time.Time // zero: it was not hit
	forgotten bool
	ready     bool   // the kernel reports what happens
	signals   uint64 // of the eventfd

	// Used by Run only.
	group *Group
	fd    int    // an eventfd, or memory.events; -1 once it is closed
	kills uint64 // that are known
	pause time.Duration
}

// NewOOMWatcher returns a watcher that calls hit with the ID of each container that was hit, in the
// goroutine of Run. hit must not block.
func NewOOMWatcher(k Kernel, hit func(id string)) (*OOMWatcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch for OOM kills: %w", err)
	}

	if err := unix.SetNonblock(fd, true); err != nil { // so that the runtime's poller waits for it
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch for OOM kills: %w", err)
	}

	return &OOMWatcher{
		kernel:  k,
		hit:     hit,
		wake:    make(chan struct{}, 1),
		poll:    os.NewFile(uintptr(fd), "epoll"),
		watched: map[string]*watched{},
		numbers: map[int32]*watched{},
	}, nil
}

// Watch watches a container whose main process was started at a time. A container that is watched
// with the same process stays as it is; with another process it begins anew, as if it was never
// hit.
func (w *OOMWatcher) Watch(id string, pid int, started time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()

	if old := w.watched[id]; old != nil && old.pid == pid {
		return
	}
	if w.watched[id] == nil && len(w.watched) >= maxWatched {
		return
	}

	w.dropLocked(id)
	w.last++
	c := &watched{id: id, pid: pid, started: started, number: w.last, fd: -1}
	w.watched[id], w.numbers[c.number] = c, c
	w.queueLocked(c)
}

// Hit returns when the OOM killer last hit a container that is, or was, watched.
func (w *OOMWatcher) Hit(id string) (at time.Time, hit bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.watched[id]
	if c == nil {
		return time.Time{}, false
	}
	return c.hitAt, !c.hitAt.IsZero()
}

// Forget ends the watch of a container that is being removed or started again.
func (w *OOMWatcher) Forget(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dropLocked(id)
}

// dropLocked forgets a container; Run closes what it holds.
func (w *OOMWatcher) dropLocked(id string) {
	c := w.watched[id]
	if c == nil {
		return
	}

	delete(w.watched, id)
	delete(w.numbers, c.number)
	c.forgotten = true
	w.queueLocked(c)
}

func (w *OOMWatcher) queueLocked(c *watched) {
	w.queue = append(w.queue, c)
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends.
func (w *OOMWatcher) Run(ctx context.Context) error {
	var reports sync.WaitGroup
	events := make(chan []int32)
	reports.Go(func() { w.wait(ctx, events) })
	defer w.closeAll()
	defer reports.Wait()
	defer w.poll.Close()

	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.wake:
			for _, c := range w.take() {
				w.update(c)
			}

		case numbers := <-events:
			for _, n := range numbers {
				w.signalled(n)
			}
		}
	}
}

// Close releases a watcher that does not run. Run does so itself when it ends.
func (w *OOMWatcher) Close() error { return w.poll.Close() }

// closeAll closes what is open when Run ends.
func (w *OOMWatcher) closeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()

	for _, c := range w.watched {
		c.close()
	}

	for _, c := range w.queue {
		c.close()
	}
}

// take takes what is queued.
func (w *OOMWatcher) take() []*watched {
	w.mu.Lock()
	defer w.mu.Unlock()
	q := w.queue
	w.queue = nil
	return q
}

// wait passes on the numbers of containers that the kernel reports, until the epoll is closed.
func (w *OOMWatcher) wait(ctx context.Context, events chan<- []int32) {
	raw, err := w.poll.SyscallConn()
	if err != nil {
		return
	}

	ready := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), ready, 0)
			return n > 0
		})
		if err != nil {
			return
		}

		numbers := make([]int32, 0, n)
		for _, e := range ready[:n] {
			numbers = append(numbers, e.Fd)
		}

		select {
		case <-ctx.Done():
			return
		case events <- numbers:
		}
	}
}

// update begins the watch of a container, counts again, or ends it.
func (w *OOMWatcher) update(c *watched) {
	w.mu.Lock()
	forgotten := c.forgotten
	w.mu.Unlock()
	switch {
	case forgotten:
		c.close()
	case c.group == nil:
		w.begin(c)
	case c.fd >= 0:
		w.count(c)
	}
}

// begin begins the watch of a container, if it has not ended.
func (w *OOMWatcher) begin(c *watched) {
	g, err := w.kernel.Of(c.pid, c.id)
	if err != nil {
		return
	}

	g.proc.close() // only the group is read
	c.group = g
	if err := w.register(c); err != nil {
		c.close()
		return
	}

	if kills, err := c.count(); err == nil && time.Since(c.started) > recentStart {
		c.kills = kills
	}

	w.count(c)
	w.mu.Lock()
	defer w.mu.Unlock()

	c.ready = true
}

// register has the kernel report changes of a container's counter.
func (w *OOMWatcher) register(c *watched) (err error) {
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: c.number}
	if c.group.V2() {
		e.Events = unix.EPOLLPRI | unix.EPOLLET
		c.fd, err = c.group.openCounter(unified, "memory.events")
	} else {
		c.fd, err = c.group.oomSignals()
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

// oomSignals returns an eventfd that the kernel signals when the group is out of memory.
func (g *Group) oomSignals() (int, error) {
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
	root, path := g.place(c)
	if root == "" {
		return -1, fs.ErrNotExist
	}
	return openBeneath(root, path+"/"+name, unix.O_RDONLY)
}

// signalled takes a report of the kernel's.
func (w *OOMWatcher) signalled(number int32) {
	w.mu.Lock()
	c := w.numbers[number]
	w.mu.Unlock()
	if c == nil || c.fd < 0 {
		return
	}

	if !c.group.V2() {
		var b [8]byte
		if n, err := unix.Read(c.fd, b[:]); err == nil && n == len(b) {
			w.mu.Lock()
			c.signals += binary.NativeEndian.Uint64(b[:])
			w.mu.Unlock()
		}
	}

	c.pause = recountFirst
	w.count(c)
}

// count reads how many processes were killed, and counts again later if the kernel may be about to
// kill one.
func (w *OOMWatcher) count(c *watched) {
	kills, err := c.count()

	switch {
	case err != nil && c.group.V2():
		c.close()
	case err != nil && c.signals > 1: // one is that of the removal
		w.note(c)
		c.close()
	case err != nil && c.pause > removalTimeout:
		c.close()
	case err != nil:
		w.countLater(c)
	case kills > c.kills:
		c.kills = kills
		w.note(c)
	case c.pause > 0 && c.pause <= recountLast:
		w.countLater(c)
	}
}

// countLater counts again after a pause, which doubles.
func (w *OOMWatcher) countLater(c *watched) {
	c.pause = max(c.pause, recountFirst)
	time.AfterFunc(c.pause, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.queueLocked(c)
	})
	c.pause *= 2
}

// note notes a hit, and reports the first.
func (w *OOMWatcher) note(c *watched) {
	w.mu.Lock()
	report := c.hitAt.IsZero() && !c.forgotten
	c.hitAt = time.Now()
	w.mu.Unlock()
	if report {
		w.hit(c.id)
	}
}

// count is how many processes of the container were killed. It is an error if the group is gone.
func (c *watched) count() (uint64, error) {
	if c.group.V2() {
		var b [512]byte
		n, err := unix.Pread(c.fd, b[:], 0)
		if err != nil {
			return 0, err
		}
		return oomKills(b[:n]), nil
	}

	return c.group.oomKillsBelow()
}

// oomKillsBelow adds up the counters of a group of cgroup v1 and of those below it, which a
// container may make; each counts its own processes only.
func (g *Group) oomKillsBelow() (sum uint64, err error) {
	root, path := g.place(memory)
	dir, err := openBeneath(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return 0, err
	}

	f := os.NewFile(uintptr(dir), g.path)
	defer f.Close()

	add := func(fd int) error {
		var buf [512]byte
		b, err := readAt(fd, "memory.oom_control", buf[:0], len(buf))
		sum += oomKills(b)
		return err
	}

	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return 0, err
	}

	if st.Nlink == 2 { // there are no groups below it
		err := add(dir)
		return sum, err
	}

	w, err := safefs.NewWalker(f)
	if err != nil {
		return 0, err
	}
	defer w.Close()

	w.Dir = func(fd int, _ *unix.Stat_t) error { return ignoreGone(add(fd)) }
	_, err = w.Walk(time.Now().Add(listedTime))

	return sum, err
}

// oomKills is the number of oom_kill in memory.oom_control or memory.events.
func oomKills(b []byte) (kills uint64) {
	for len(b) > 0 {
		var line []byte
		line, b = cut(b, '\n')
		if name, value := cut(line, ' '); string(name) == "oom_kill" {
			kills, _ = strconv.ParseUint(string(trim(value)), 10, 64)
		}
	}

	return kills
}

// close closes what a watch holds.
func (c *watched) close() {
	if c.fd >= 0 {
		_ = unix.Close(c.fd) // which takes it out of the epoll too
		c.fd = -1
	}
	if c.group != nil {
		c.group.Close()
	}
}
