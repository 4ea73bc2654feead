package driver

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// alarmInterval is the interval between two checks of raised alarms.
const alarmInterval = time.Second

// listener raises an alarm if it cannot accept a connection for lack of a descriptor. net/http
// retries with pauses of up to a second.
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

// clearAlarms clears the alarms of shortages that are over. It sleeps while no alarm is raised.
func (d *Driver) clearAlarms() {
	for {
		changed := d.alarms.changed.next()
		var tick <-chan time.Time
		if len(d.alarms.list()) > 0 {
			tick = time.After(alarmInterval)
		}

		select {
		case <-d.closed:
			return
		case <-changed:
		case <-tick:
			d.checkDescriptors()
			d.growPipes()
		}
	}
}

// checkDescriptors clears the alarm as soon as a file can be opened.
func (d *Driver) checkDescriptors() {
	if fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(fd)
		d.alarms.lower(alarmDescriptors)
	}
}

// growPipes grows small pipes. A busy stream grows its own.
func (d *Driver) growPipes() {
	for _, s := range d.all() {
		s.growIfIdle()
	}
	d.buffers.growIdle()
}
