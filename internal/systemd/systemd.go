// Package systemd sets properties of systemd's units, and reports when systemd has read its
// configuration again. It connects to the private D-Bus socket of systemd, which needs no bus
// daemon.
package systemd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
)

// PrivateSocket is the socket of systemd for root's programs. systemctl uses it too.
const PrivateSocket = "/run/systemd/private"

// Names of systemd's D-Bus interface (org.freedesktop.systemd1(5)).
const (
	destination = "org.freedesktop.systemd1"
	managerPath = "/org/freedesktop/systemd1"
	manager     = destination + ".Manager"

	noSuchUnit       = destination + ".NoSuchUnit"
	invalidArguments = "org.freedesktop.DBus.Error.InvalidArgs"
	unknownProperty  = "org.freedesktop.DBus.Error.PropertyReadOnly"
)

// readSize is the number of bytes read at once: some dozens of messages.
const readSize = 16 << 10

const (
	// writeTimeout bounds one write to systemd. A message fits into an empty socket buffer.
	writeTimeout = 3 * time.Second
	// reconnectTimeout bounds one attempt to connect again, including a reexecution in progress.
	reconnectTimeout = 30 * time.Second
	// A failed attempt is repeated after reconnectMin, then after twice the pause, up to
	// reconnectMax.
	reconnectMin = 100 * time.Millisecond
	reconnectMax = 5 * time.Second
)

// Property is a property of a unit (org.freedesktop.systemd1(5), systemd.resource-control(5)).
type Property struct {
	Name  string
	Value any // uint64 or []byte, as in the property's signature
}

// Manager is a connection to systemd. It connects with the first call. It is safe for concurrent
// use.
type Manager struct {
	socket       string
	log          *slog.Logger
	reloaded     chan struct{}
	disconnected chan struct{} // an element after a connection has ended
	dialing      chan struct{} // holds an element while a call connects

	mu     sync.Mutex // guards conn and closed
	conn   *dbus.Conn // nil while not connected
	closed bool
}

// New returns a Manager for a socket of systemd, such as PrivateSocket.
func New(socket string, log *slog.Logger) *Manager {
	return &Manager{
		socket:       socket,
		log:          log,
		reloaded:     make(chan struct{}, 1),
		disconnected: make(chan struct{}, 1),
		dialing:      make(chan struct{}, 1),
	}
}

// Run connects again whenever systemd has closed the connection, until ctx ends.
func (m *Manager) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.disconnected:
		}

		if !m.reconnect(ctx) {
			return
		}

		signal(m.reloaded)
	}
}

// reconnect returns true once systemd answers again. A reexecution may take seconds.
func (m *Manager) reconnect(ctx context.Context) bool {
	warned := false
	for pause := reconnectMin; ; pause = min(2*pause, reconnectMax) {
		pingCtx, cancel := context.WithTimeout(ctx, reconnectTimeout)
		err := m.Sync(pingCtx)
		cancel()
		if err == nil {
			return true
		}

		if pause == reconnectMax && !warned {
			m.log.Warn("lost the connection to systemd; limits of containers may be lost until it is back", "err", err)
			warned = true
		}

		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// signal adds an element to a channel, unless there is one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close closes the connection. Later calls fail.
func (m *Manager) Close() error {
	m.mu.Lock()
	conn := m.conn
	m.conn, m.closed = nil, true
	m.mu.Unlock()

	if conn == nil {
		return nil
	}

	err := conn.Close()
	if errors.Is(err, net.ErrClosed) { // after a failed write
		return nil
	}

	return err
}

// Reloaded delivers an element after systemd may have replaced the values of control groups: after
// `systemctl daemon-reload`, and once Run has restored a lost connection, as after `systemctl
// daemon-reexec`.
func (m *Manager) Reloaded() <-chan struct{} { return m.reloaded }

// SetProperties sets properties of a loaded unit until it ends (systemctl set-property --runtime).
// systemd applies them after the return; see Sync. The error is NotFound if the unit is not loaded,
// InvalidArgument if systemd rejects a property, and Unavailable if systemd does not answer before
// ctx ends.
func (m *Manager) SetProperties(ctx context.Context, unit string, properties []Property) error {
	type property struct {
		Name  string
		Value dbus.Variant
	}

	list := make([]property, len(properties))
	for i, p := range properties {
		list[i] = property{p.Name, dbus.MakeVariant(p.Value)}
	}

	return wrap(m.call(ctx, manager+".SetUnitProperties", unit, true, list), "set properties of %s", unit)
}

// Sync returns after systemd has applied all earlier changes to the control groups, its own
// (SetProperties) and those of other clients. systemd applies pending changes before it handles the
// next message. The error is Unavailable if systemd does not answer before ctx ends.
func (m *Manager) Sync(ctx context.Context) error {
	return wrap(m.call(ctx, "org.freedesktop.DBus.Peer.Ping"), "ping")
}

// call calls a method of systemd's manager. A call that meets the end of a connection, as at a
// reexecution of systemd, is repeated once on a new one: all calls here have the same effect twice.
func (m *Manager) call(ctx context.Context, method string, args ...any) error {
	for repeated := false; ; repeated = true {
		conn, err := m.connect(ctx)
		if err != nil {
			return err
		}

		err = conn.Object(destination, managerPath).CallWithContext(ctx, method, dbus.FlagNoAutoStart, args...).Err
		if repeated || !isLost(err) {
			return err
		}

		select {
		case <-conn.Context().Done():
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// isLost reports whether an error of a call is the end of its connection. transport closes a
// connection after a failed write.
func isLost(err error) bool {
	var network *net.OpError
	return errors.Is(err, dbus.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &network)
}

// connect returns the connection, and connects if there is none.
func (m *Manager) connect(ctx context.Context) (*dbus.Conn, error) {
	select {
	case m.dialing <- struct{}{}:
		defer func() { <-m.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}

	if conn, err := m.current(); conn != nil || err != nil {
		return conn, err
	}

	conn, err := m.dial(ctx)
	if err != nil {
		return nil, err
	}

	if err := m.keep(conn); err != nil {
		return nil, errors.Join(err, conn.Close())
	}

	return conn, nil
}

// current returns the connection, or nil without one.
func (m *Manager) current() (*dbus.Conn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, net.ErrClosed
	}
	if m.conn != nil && !m.conn.Connected() {
		return nil, nil // lost follows
	}
	return m.conn, nil
}

// keep makes a new connection the current one, until it ends.
func (m *Manager) keep(conn *dbus.Conn) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return net.ErrClosed
	}

	m.conn = conn
	context.AfterFunc(conn.Context(), func() { m.lost(conn) })

	return nil
}

// lost forgets a connection that has ended. Signals may be missing from then on.
func (m *Manager) lost(conn *dbus.Conn) {
	m.mu.Lock()
	if m.conn == conn {
		m.conn = nil
	}
	closed := m.closed
	m.mu.Unlock()

	if !closed {
		signal(m.disconnected)
	}
}

// dial connects and authenticates before ctx ends. A private connection needs no Hello, and gets
// all signals of systemd.
func (m *Manager) dial(ctx context.Context) (*dbus.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", m.socket)
	if err != nil {
		return nil, err
	}

	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	conn, err := dbus.NewConn(transport{c, bufio.NewReaderSize(c, readSize)},
		dbus.WithSignalHandler(signals{m.reloaded}))
	if err != nil {
		stop()
		return nil, errors.Join(err, c.Close())
	}

	err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))})
	if !stop() {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		_ = conn.Close() // err has the cause
		return nil, err
	}

	return conn, nil
}

// transport buffers the reads from a connection, because the library reads in pieces of a few
// bytes, and systemd sends thousands of signals during a reload. It bounds the writes. After a
// failed write the connection is useless: a part of a message may have been sent.
type transport struct {
	net.Conn
	in *bufio.Reader
}

// Read implements io.Reader.
func (t transport) Read(b []byte) (int, error) { return t.in.Read(b) }

// Write implements io.Writer.
func (t transport) Write(b []byte) (int, error) {
	if err := t.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}

	n, err := t.Conn.Write(b)
	if err != nil {
		_ = t.Close() // ends the reads, and with them the connection
	}

	return n, err
}

// signals reports the end of a reload. systemd has applied its values to the control groups before
// it sends the signal.
type signals struct{ reloaded chan<- struct{} }

// DeliverSignal implements dbus.SignalHandler.
func (s signals) DeliverSignal(iface, name string, m *dbus.Signal) {
	if iface == manager && name == "Reloading" && len(m.Body) == 1 && m.Body[0] == false {
		signal(s.reloaded)
	}
}

// wrap adds the operation and a kind to an error.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}

	var kind error = errdefs.ErrUnavailable
	var d dbus.Error
	if errors.As(err, &d) {
		switch d.Name {
		case noSuchUnit:
			kind = errdefs.ErrNotFound
		case invalidArguments, unknownProperty:
			kind = errdefs.ErrInvalidArgument
		}
	}

	return fmt.Errorf("systemd: %s: %w: %w", fmt.Sprintf(format, args...), err, kind)
}
