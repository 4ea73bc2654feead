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

// maxHeld limits the processes watched by Exits. Each takes one descriptor.
const maxHeld = 4096

// Exits obtains the exit codes of containers' main processes from the kernel, for exits that no
// engine observed. It holds a pidfd of each process while it runs. Linux 6.15 and later keep the
// exit status of a reaped process for the holders of its pidfd (PIDFD_GET_INFO, PIDFD_INFO_EXIT).
// On older kernels no exit code is ever available.
//
// Exits is safe for concurrent use. Run does all the work, and the other methods only update or
// read the table.
type Exits struct {
	fs   FS
	wake chan struct{} // has an element while there is work
	poll *os.File      // the epoll descriptor; its events carry the number of a process

	mu      sync.Mutex // guards the fields below
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
	ended     time.Time // zero while it runs
	code      int
	known     bool // code is the exit code

	fd int // only used by Run; -1 if closed
}

// NewExits returns an Exits for the processes of a procfs.
func NewExits(fs FS) (*Exits, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch process exits: %w", err)
	}

	if err := unix.SetNonblock(fd, true); err != nil { // lets the runtime's poller wait for it
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch process exits: %w", err)
	}

	return &Exits{
		fs:      fs,
		wake:    make(chan struct{}, 1),
		poll:    os.NewFile(uintptr(fd), "epoll"),
		held:    map[string]*heldProcess{},
		numbers: map[int32]*heldProcess{},
	}, nil
}

// Watch watches the main process of a container. It is a no-op for a process already watched, and
// replaces a previous process of the container. It ignores processes outside the container's
// control group and processes beyond the limit of 4096.
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

// Exit returns the exit code of a container's main process and its end time. For a process killed
// by a signal the code is 128 plus the signal's number.
func (x *Exits) Exit(container string) (code int, ended time.Time, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p := x.held[container]
	if p == nil || !p.known {
		return 0, time.Time{}, false
	}
	return p.code, p.ended, true
}

// Forget stops watching a container that is being removed or restarted.
func (x *Exits) Forget(container string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.dropLocked(container)
}

// dropLocked removes a container from the table. Run closes its descriptor later.
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

// Run watches processes until ctx ends.
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
				x.recordEnd(n)
			}
		}
	}
}

// Close releases an Exits without a running Run. Run closes it itself on return.
func (x *Exits) Close() error { return x.poll.Close() }

// closeAll closes all open descriptors when Run returns.
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

// take empties the queue and returns its content.
func (x *Exits) take() []*heldProcess {
	x.mu.Lock()
	defer x.mu.Unlock()
	q := x.queue
	x.queue = nil
	return q
}

// pollEnds sends the numbers of ended or reaped processes to ended, until the epoll descriptor is
// closed.
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

// update starts or stops the watch of a process.
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

// hold opens the pidfd of a process. It ignores a process that has already ended, because its
// engine observed the exit.
func (x *Exits) hold(p *heldProcess) {
	fd, err := x.fs.openContainerProcess(p.pid, p.container)
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

// openContainerProcess opens a pidfd of a process in a container's control group. It opens the
// /proc directory before the pidfd and reads the group through it. If the process still runs at
// that moment, both refer to the same process.
func (f FS) openContainerProcess(pid int, container string) (int, error) {
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

// recordEnd records the end of a process. The kernel reports the exit, and reports again after the
// process is reaped. Only then is the exit code available.
func (x *Exits) recordEnd(number int32) {
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

// readExit returns the exit code of a process. known is false until the process is reaped. The
// kernel stores the code just before the process disappears, so a read in between finds neither and
// fails with ESRCH. The next read returns the code.
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

// exitCode returns a shell's exit code for a wait status.
func exitCode(status unix.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// close closes the pidfd and thereby removes it from the epoll set.
func (p *heldProcess) close() {
	if p.fd >= 0 {
		_ = unix.Close(p.fd)
		p.fd = -1
	}
}
