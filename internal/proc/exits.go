package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxHeld bounds the processes that Exits holds, with one descriptor each.
const maxHeld = 4096

// Exits learns from the kernel how the main processes of containers end, for containers whose end
// no engine saw. It holds a pidfd of each process while it runs: Linux 6.15 and later keep the exit
// status of a process that was reaped for those who have its pidfd (PIDFD_GET_INFO,
// PIDFD_INFO_EXIT). With an older kernel it never knows.
//
// It is safe for concurrent use. Run does all the work; the other methods only note or look up.
type Exits struct {
	fs   FS
	wake chan struct{} // an element when there is something to do
	poll *os.File      // of epoll; its events have the number of a process

	mu      sync.Mutex // guards the rest
	held    map[string]*heldProcess
	numbers map[int32]*heldProcess
	last    int32
	queue   []*heldProcess
}

// heldProcess is the main process of a container.
type heldProcess struct {
	container string
	pid       int
	number    int32

	// Guarded by Exits.mu.
	forgotten bool
	ended     time.Time // zero: it runs
	code      int
	known     bool // code is its exit code

	fd int // used by Run only; -1: not open
}

// NewExits returns one that reads processes of a procfs.
func NewExits(fs FS) (*Exits, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch for the ends of processes: %w", err)
	}

	if err := unix.SetNonblock(fd, true); err != nil { // so that the runtime's poller waits for it
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch for the ends of processes: %w", err)
	}

	return &Exits{
		fs:      fs,
		wake:    make(chan struct{}, 1),
		poll:    os.NewFile(uintptr(fd), "epoll"),
		held:    map[string]*heldProcess{},
		numbers: map[int32]*heldProcess{},
	}, nil
}

// Watch watches the main process of a container. A process that is watched stays so, and another
// one replaces it. One that is not in the container's control group is not watched, nor one beyond
// 4096.
func (x *Exits) Watch(container string, pid int) {
	x.mu.Lock()
	defer x.mu.Unlock()

	old := x.held[container]
	if old != nil && old.pid == pid || old == nil && len(x.held) >= maxHeld {
		return
	}

	x.dropLocked(container)
	x.last++
	p := &heldProcess{container: container, pid: pid, number: x.last, fd: -1}
	x.held[container], x.numbers[p.number] = p, p
	x.queueLocked(p)
}

// Exit returns the exit code of a container's main process, and when it ended. The code of a
// process that a signal has ended is 128 and the signal's number.
func (x *Exits) Exit(container string) (code int, ended time.Time, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p := x.held[container]
	if p == nil || !p.known {
		return 0, time.Time{}, false
	}
	return p.code, p.ended, true
}

// Forget ends the watch of a container that is being removed or started again.
func (x *Exits) Forget(container string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.dropLocked(container)
}

// dropLocked forgets a container; Run closes what it holds.
func (x *Exits) dropLocked(container string) {
	p := x.held[container]
	if p == nil {
		return
	}

	delete(x.held, container)
	delete(x.numbers, p.number)
	p.forgotten = true
	x.queueLocked(p)
}

func (x *Exits) queueLocked(p *heldProcess) {
	x.queue = append(x.queue, p)
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends.
func (x *Exits) Run(ctx context.Context) error {
	var polling sync.WaitGroup
	ended := make(chan []int32)
	polling.Go(func() { x.pollEnds(ctx, ended) })
	defer x.closeAll()
	defer polling.Wait()
	defer x.poll.Close()

	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-x.wake:
			for _, p := range x.take() {
				x.update(p)
			}

		case numbers := <-ended:
			for _, n := range numbers {
				x.noteEnd(n)
			}
		}
	}
}

// Close releases one that does not run. Run does so itself when it ends.
func (x *Exits) Close() error { return x.poll.Close() }

// closeAll closes what is open when Run ends.
func (x *Exits) closeAll() {
	x.mu.Lock()
	defer x.mu.Unlock()

	for _, p := range x.held {
		p.close()
	}

	for _, p := range x.queue {
		p.close()
	}
}

// take takes what is queued.
func (x *Exits) take() []*heldProcess {
	x.mu.Lock()
	defer x.mu.Unlock()
	q := x.queue
	x.queue = nil
	return q
}

// pollEnds passes on the numbers of processes that ended or were reaped, until the epoll is closed.
func (x *Exits) pollEnds(ctx context.Context, ended chan<- []int32) {
	raw, err := x.poll.SyscallConn()
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
		case ended <- numbers:
		}
	}
}

// update begins the watch of a process, or ends it.
func (x *Exits) update(p *heldProcess) {
	x.mu.Lock()
	forgotten := p.forgotten
	x.mu.Unlock()
	switch {
	case forgotten:
		p.close()
	case p.fd < 0:
		x.hold(p)
	}
}

// hold opens the pidfd of a process. A process that ended before is not known: its engine saw the
// end.
func (x *Exits) hold(p *heldProcess) {
	fd, err := x.fs.openContainers(p.pid, p.container)
	if err != nil {
		return
	}

	p.fd = fd

	raw, err := x.poll.SyscallConn()
	if err == nil {
		e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: p.number}
		add := func(poll uintptr) { err = unix.EpollCtl(int(poll), unix.EPOLL_CTL_ADD, fd, &e) }
		err = errors.Join(raw.Control(add), err)
	}

	if err != nil {
		p.close()
	}
}

// openContainers opens a pidfd of a process that is in a container's control group. The group is
// read through a directory that was opened before the pidfd: both are the same process if it still
// runs then.
func (f FS) openContainers(pid int, container string) (int, error) {
	d, err := f.Open(strconv.Itoa(pid))
	if err != nil {
		return -1, err
	}
	defer d.Close()

	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}

	if !d.InCgroup(container) {
		_ = unix.Close(fd)
		return -1, ErrForeign
	}

	return fd, nil
}

// noteEnd notes that a process has ended. The kernel reports that, and once more when the process
// was reaped, which is when its exit code is known.
func (x *Exits) noteEnd(number int32) {
	x.mu.Lock()
	p := x.numbers[number]
	x.mu.Unlock()
	if p == nil || p.fd < 0 {
		return
	}

	ended := time.Now()
	code, known, err := readExit(p.fd)
	if known || err != nil {
		p.close()
	}

	x.mu.Lock()
	defer x.mu.Unlock()

	if p.ended.IsZero() {
		p.ended = ended
	}

	p.code, p.known = code, known
}

// readExit returns the exit code of a process, known if it was reaped. The kernel keeps the code
// just before the process disappears. A read in between finds neither (ESRCH), and the next one has
// the code.
func readExit(pidfd int) (code int, known bool, err error) {
	for range 2 {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		err = unix.IoctlPidfdInfo(pidfd, &info)
		if err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0 {
			return exitCode(unix.WaitStatus(info.Exit_code)), true, nil
		}

		if !errors.Is(err, unix.ESRCH) {
			break
		}
	}

	return 0, false, err
}

// exitCode is the code that a shell shows for a status.
func exitCode(status unix.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// close closes the pidfd, which takes it out of the epoll too.
func (p *heldProcess) close() {
	if p.fd >= 0 {
		_ = unix.Close(p.fd)
		p.fd = -1
	}
}
