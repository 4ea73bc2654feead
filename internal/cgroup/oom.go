package cgroup

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxWatched limits the containers watched by OOMWatcher. Each takes one descriptor.
const maxWatched = 4096

const (
	// The counter is read again after recountFirst, twice that, and so on until recountLast. The
	// kernel reports the shortage of memory a moment before it kills a process.
	recountFirst = time.Millisecond
	recountLast  = 100 * time.Millisecond
	// removalTimeout limits the time until the kernel signals the removal of a group.
	removalTimeout = 10 * time.Second
	// recentStart is the maximum age of a container for which a kill before the start of its watch
	// counts. For an older container the daemon has been restarted, and the kill may be old.
	recentStart = 10 * time.Second
)

// OOMWatcher learns from the kernel in which containers the OOM killer has killed a process. A
// container's group, and its counters, are removed as soon as the container ends. So the watcher
// reads them when the kernel reports a change:
//
//   - cgroup v1: memory.oom_control signals an eventfd when the group or a parent runs out of
//     memory, and once more when the group is removed. Its oom_kill counts killed processes of the
//     group itself (Documentation/admin-guide/cgroup-v1/memory.rst, section 10).
//   - cgroup v2: memory.events can be polled. Its oom_kill includes the groups below
//     (Documentation/admin-guide/cgroup-v2.rst). The kernel does not report the last change of a
//     group that is removed at once, but the group around it has counted it (podGroup).
//
// containerd derives its OOM events from the same sources. If a v1 group is removed before it can
// be read, it counts as hit if the kernel signalled more than the removal.
//
// OOMWatcher is safe for concurrent use. Run does all the work, and the other methods only update
// or read the table.
type OOMWatcher struct {
	kernel Kernel
	hit    func(id string) // called without a lock when the OOM killer hits a container

	wake chan struct{} // has an element while there is work
	poll *os.File      // the epoll descriptor; its events carry the container's number

	mu      sync.Mutex // guards the fields below
	watched map[string]*watched
	numbers map[int32]*watched // by the number in their epoll events
	last    int32
	queue   []*watched
	settles []settle

	pods map[string]*podGroup // by path, only used by Run
}

// watched is the state of a watched container.
type watched struct {
	id      string
	pod     string // the pause's ID
	pid     int    // 0 if the process was never watched
	started time.Time
	number  int32

	// Guarded by OOMWatcher.mu.
	hitAt     time.Time // zero if it was never hit
	forgotten bool
	ready     bool   // the kernel reports events
	signals   uint64 // received on the eventfd

	// Only used by Run.
	group   *Group
	around  *podGroup // with cgroup v2
	fd      int       // an eventfd, or memory.events; -1 after it is closed
	removed time.Time // when its removed group was noticed, with cgroup v2
	kills   uint64    // already recorded
	pause   time.Duration
}

// NewOOMWatcher returns a watcher. In the goroutine of Run it calls hit with the ID of each
// container hit by the OOM killer. hit must not block.
func NewOOMWatcher(k Kernel, hit func(id string)) (*OOMWatcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch OOM kills: %w", err)
	}

	if err := unix.SetNonblock(fd, true); err != nil { // lets the runtime's poller wait for it
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch OOM kills: %w", err)
	}

	return &OOMWatcher{
		kernel:  k,
		hit:     hit,
		wake:    make(chan struct{}, 1),
		poll:    os.NewFile(uintptr(fd), "epoll"),
		watched: map[string]*watched{},
		numbers: map[int32]*watched{},
		pods:    map[string]*podGroup{},
	}, nil
}

// Watch watches a container of a pod, or the pod's pause, with its main process's PID and start
// time. It is a no-op for a container already watched with the same process. With another process
// the watch starts again, as if the container had never been hit.
func (w *OOMWatcher) Watch(id, pod string, pid int, started time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()

	if old := w.watched[id]; old != nil && old.pid == pid {
		return
	}

	w.dropLocked(id)
	if c := w.addLocked(id, pod); c != nil {
		c.pid, c.started = pid, started
		w.queueLocked(c)
	}
}

// addLocked adds a container to the table. It returns nil if the table is full.
func (w *OOMWatcher) addLocked(id, pod string) *watched {
	if len(w.watched) >= maxWatched {
		return nil
	}

	w.last++
	c := &watched{id: id, pod: pod, number: w.last, fd: -1}
	w.watched[id], w.numbers[c.number] = c, c

	return c
}

// Hit returns the time of the last OOM kill in a watched container.
func (w *OOMWatcher) Hit(id string) (at time.Time, hit bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.watched[id]
	if c == nil {
		return time.Time{}, false
	}
	return c.hitAt, !c.hitAt.IsZero()
}

// Forget stops watching a container that is being removed or restarted.
func (w *OOMWatcher) Forget(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dropLocked(id)
}

// dropLocked removes a container from the table. Run closes its descriptors later.
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
	w.wakeUp()
}

func (w *OOMWatcher) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run watches containers until ctx ends.
func (w *OOMWatcher) Run(ctx context.Context) error {
	var reports sync.WaitGroup
	events := make(chan []int32)
	reports.Go(func() { w.pollEvents(ctx, events) })
	defer w.closeAll()
	defer reports.Wait()
	defer w.poll.Close()

	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.wake:
			queue, settles := w.take()
			for _, c := range queue {
				w.update(c)
			}
			for _, s := range settles {
				w.settle(s)
			}

		case numbers := <-events:
			for _, n := range numbers {
				w.handleSignal(n)
			}
		}
	}
}

// Close releases a watcher without a running Run. Run closes it itself on return.
func (w *OOMWatcher) Close() error { return w.poll.Close() }

// closeAll closes all open descriptors when Run returns.
func (w *OOMWatcher) closeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()

	for _, c := range w.watched {
		c.close()
	}

	for _, c := range w.queue {
		c.close()
	}

	for _, p := range w.pods {
		_ = unix.Close(p.fd)
	}
}

// take empties the queues and returns their contents.
func (w *OOMWatcher) take() ([]*watched, []settle) {
	w.mu.Lock()
	defer w.mu.Unlock()
	queue, settles := w.queue, w.settles
	w.queue, w.settles = nil, nil
	return queue, settles
}

// pollEvents sends the numbers of containers with events to events, until the epoll descriptor is
// closed.
func (w *OOMWatcher) pollEvents(ctx context.Context, events chan<- []int32) {
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

// update starts the watch of a container, counts its kills again, or stops the watch.
func (w *OOMWatcher) update(c *watched) {
	w.mu.Lock()
	forgotten := c.forgotten
	w.mu.Unlock()
	switch {
	case forgotten:
		c.close()
		w.leave(c)
	case c.group == nil:
		w.start(c)
	case c.fd >= 0:
		w.countWatched(c)
	}
}

// start starts the watch of a running container.
func (w *OOMWatcher) start(c *watched) {
	g, err := w.kernel.FindGroup(c.pid, c.id)
	if err != nil {
		return
	}

	g.proc.close() // only the group is read
	c.group = g
	isNew := w.join(c)
	if c.id == c.pod { // no CRI status has a pause's reason
		c.close()
		return
	}

	if err := w.register(c); err != nil {
		c.close()
		return
	}

	if kills, err := c.count(); err == nil {
		switch {
		case time.Since(c.started) > recentStart:
			c.kills = kills
		case isNew:
			c.around.known -= min(kills, c.around.known) // count adds them
		}
	}

	w.count(c)
	w.mu.Lock()
	defer w.mu.Unlock()

	c.ready = true
}

// handleSignal handles an event from the kernel.
func (w *OOMWatcher) handleSignal(number int32) {
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
	w.countWatched(c)
}

// recordKill records an OOM kill, and calls hit for the first one.
func (w *OOMWatcher) recordKill(c *watched) {
	w.mu.Lock()
	report := c.hitAt.IsZero() && !c.forgotten
	c.hitAt = time.Now()
	w.mu.Unlock()
	if report {
		w.hit(c.id)
	}
}

// close closes the descriptors of a watch.
func (c *watched) close() {
	if c.fd >= 0 {
		_ = unix.Close(c.fd) // this also removes it from the epoll set
		c.fd = -1
	}
	if c.group != nil {
		c.group.Close()
	}
}
