package driver

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// idleScratch is how many buffers are kept for the next batch.
	idleScratch = 4
	// tendEvery is the interval in which a shortage is looked after.
	tendEvery = time.Second
	// scratchTimeout is how long a batch waits for buffers of another one when there are no descriptors
	// for new ones.
	scratchTimeout = time.Second
)

// listener raises an alarm when no connection can be accepted for want of a descriptor. net/http
// tries again, with pauses of up to a second.
type listener struct {
	net.Listener
	alarms *alarms
}

// Listener is l with an alarm for shortages.
func (d *Driver) Listener(l net.Listener) net.Listener { return listener{l, d.alarms} }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if isShortage(err) {
		l.alarms.raise(alarmDescriptors)
	}
	return c, err
}

// tend looks after shortages while there are some: it lowers the alarms of those that are over.
func (d *Driver) tend() {
	for {
		changed := d.alarms.changed.next()
		var tick <-chan time.Time
		if len(d.alarms.list()) > 0 {
			tick = time.After(tendEvery)
		}
		select {
		case <-d.closed:
			return
		case <-changed:
		case <-tick:
			d.tendDescriptors()
			d.tendPipes()
		}
	}
}

// tendDescriptors lowers the alarm as soon as a file can be opened.
func (d *Driver) tendDescriptors() {
	if fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(fd)
		d.alarms.lower(alarmDescriptors)
	}
}

// tendPipes lets small pipes grow that nobody uses just now.
func (d *Driver) tendPipes() {
	d.mu.Lock()
	all := make([]*stream, 0, len(d.streams))
	for _, s := range d.streams {
		all = append(all, s)
	}
	d.mu.Unlock()
	for _, s := range all {
		select {
		case s.busy <- struct{}{}:
			if !s.closed {
				s.growFIFO()
			}
			s.unlock()
		default: // it does so itself
		}
	}

	for range idleScratch {
		select {
		case b := <-d.scratch:
			d.growScratch(b)
			d.giveScratch(b)
		default:
			return
		}
	}
}

// takeScratch returns buffers for a batch. When there are no descriptors for new ones, it waits for
// those of another batch.
func (d *Driver) takeScratch() (*scratch, error) {
	select {
	case b := <-d.scratch:
		return b, nil
	default:
	}
	b, err := d.openScratch()
	if err == nil {
		return b, nil
	}

	t := time.NewTimer(scratchTimeout)
	defer t.Stop()
	select {
	case b := <-d.scratch:
		return b, nil
	case <-t.C:
		return nil, err
	}
}

// giveScratch takes back buffers. What is left in their pipe, after an error only, goes with it.
func (d *Driver) giveScratch(b *scratch) {
	if b.dirty && b.empty() != nil {
		d.closeScratch(b)
		return
	}
	select {
	case d.scratch <- b:
	default:
		d.closeScratch(b)
	}
}

func (d *Driver) openScratch() (*scratch, error) {
	b, err := newScratch(d.cfg.pipeSize)
	if err != nil {
		if isShortage(err) {
			d.alarms.raise(alarmDescriptors)
		}
		return nil, err
	}
	d.alarms.add(alarmPipes, small(b.size))
	return b, nil
}

func (d *Driver) closeScratch(b *scratch) {
	d.alarms.add(alarmPipes, -small(b.size))
	b.close()
}

func (d *Driver) growScratch(b *scratch) {
	before := small(b.size)
	b.grow()
	d.alarms.add(alarmPipes, small(b.size)-before)
}
