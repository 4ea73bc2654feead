package driver

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// poller reports pending data in a FIFO, once for each arm. Go's own poller would wake up for every
// line written by the engine, even while lines gather, and this costs more than the lines.
type poller struct {
	epoll int
	wake  int // an eventfd to stop run

	mu    sync.Mutex // guards ready
	ready map[int]chan<- struct{}
	ended chan struct{}
}

func newPoller() (*poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}

	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err == nil {
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}
		err = unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, wake, &event)
	}

	if err != nil {
		return nil, errors.Join(fmt.Errorf("epoll: %w", err), unix.Close(epoll))
	}

	p := &poller{
		epoll: epoll,
		wake:  wake,
		ready: map[int]chan<- struct{}{},
		ended: make(chan struct{}),
	}

	go p.run()

	return p, nil
}

// add registers a file. It is not polled before the first arm.
func (p *poller) add(fd int, ready chan<- struct{}) error {
	p.mu.Lock()
	p.ready[fd] = ready
	p.mu.Unlock()
	event := unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(fd)}
	return unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &event)
}

// arm requests one notification. It is immediate if data is already pending or all writers have
// closed the FIFO.
func (p *poller) arm(fd int) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(fd)}
	return unix.EpollCtl(p.epoll, unix.EPOLL_CTL_MOD, fd, &event)
}

// remove removes a file. Call it before closing the file.
func (p *poller) remove(fd int) {
	_ = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil) // closing does the same
	p.mu.Lock()
	delete(p.ready, fd)
	p.mu.Unlock()
}

func (p *poller) run() {
	defer close(p.ended)

	events := make([]unix.EpollEvent, 64)
	for {
		n, err := retry(func() (int64, error) {
			n, err := unix.EpollWait(p.epoll, events, -1)
			return int64(n), err
		})
		if err != nil {
			return
		}

		for _, e := range events[:n] {
			if int(e.Fd) == p.wake {
				return
			}

			p.mu.Lock()
			ready := p.ready[int(e.Fd)]
			p.mu.Unlock()
			select {
			case ready <- struct{}{}:
			default: // already notified, or removed meanwhile
			}
		}
	}
}

func (p *poller) close() {
	_, _ = unix.Write(p.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-p.ended
	unix.Close(p.wake)
	unix.Close(p.epoll)
}
