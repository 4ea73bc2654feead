package driver

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// tendInterval is how often the alarms that are raised are checked.
const tendInterval = time.Second

// listener raises an alarm when no connection can be accepted for lack of a descriptor. net/http
// tries again, with pauses of up to a second.
type listener struct {
	net.Listener
	alarms *alarms
}

// Listener returns l with an alarm for shortages.
func (d *Driver) Listener(l net.Listener) net.Listener { return listener{l, d.alarms} }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if isShortage(err) {
		l.alarms.raise(alarmDescriptors)
	}
	return c, err
}

// tend lowers the alarms of shortages that are over. While no alarm is raised it sleeps.
func (d *Driver) tend() {
	for {
		changed := d.alarms.changed.next()
		var tick <-chan time.Time
		if len(d.alarms.list()) > 0 {
			tick = time.After(tendInterval)
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

// tendPipes lets small pipes grow. A stream that is busy grows its own.
func (d *Driver) tendPipes() {
	for _, s := range d.all() {
		s.growIfIdle()
	}
	d.buffers.growIdle()
}
