package systemd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
	"go.uber.org/goleak"
)

var discard = slog.New(slog.DiscardHandler)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer is systemd's end of the private socket.
type peer struct {
	listener net.Listener
	answer   func(*dbus.Message) *dbus.Message // nil: no answer

	mu    sync.Mutex
	conns []net.Conn
	calls []string
	wg    sync.WaitGroup
}

// newPeer returns a Manager and its peer. The peer answers each call with success, except for those
// of the test.
func newPeer(t *testing.T, answer func(*dbus.Message) *dbus.Message) (*Manager, *peer) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	p := &peer{listener: l, answer: answer}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			p.conns = append(p.conns, c)
			p.mu.Unlock()
			p.wg.Go(func() { p.serve(c) })
		}
	})

	m := New(socket, discard)
	ctx, cancel := context.WithCancel(t.Context())
	p.wg.Go(func() { m.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		_ = l.Close()
		p.disconnect()
		p.wg.Wait()
	})

	return m, p
}

// serve authenticates a client (D-Bus specification, Authentication Protocol) and answers its
// calls.
func (p *peer) serve(c net.Conn) {
	defer c.Close()
	in := bufio.NewReader(c)
	for _, step := range [][2]string{
		{"\x00AUTH\r\n", "REJECTED EXTERNAL\r\n"},
		{"AUTH EXTERNAL", "OK 1234\r\n"},
		{"BEGIN", ""},
	} {
		line, err := in.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, step[0]) {
			return
		}
		if _, err := c.Write([]byte(step[1])); err != nil {
			return
		}
	}

	for {
		m, err := dbus.DecodeMessage(in)
		if err != nil {
			return
		}

		p.mu.Lock()
		p.calls = append(p.calls, fmt.Sprint(m.Headers[dbus.FieldMember].Value(), " ", m.Body))
		p.mu.Unlock()

		if reply := p.answer(m); reply != nil {
			reply.Headers[dbus.FieldReplySerial] = dbus.MakeVariant(m.Serial())
			_ = p.send(c, reply)
		}
	}
}

func (p *peer) send(c net.Conn, m *dbus.Message) error {
	if len(m.Body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	}
	return m.EncodeTo(c, binary.LittleEndian)
}

// signal sends a signal of the manager over all connections.
func (p *peer) signal(t *testing.T, name string, body ...any) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		err := p.send(c, &dbus.Message{Type: dbus.TypeSignal, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath(managerPath)),
			dbus.FieldInterface: dbus.MakeVariant(manager),
			dbus.FieldMember:    dbus.MakeVariant(name),
		}})
		if err != nil {
			t.Error(err)
		}
	}
}

// disconnect closes all connections, as a daemon-reexec does.
func (p *peer) disconnect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}

func success(*dbus.Message) *dbus.Message { return reply(dbus.TypeMethodReply) }

func reply(kind dbus.Type) *dbus.Message {
	return &dbus.Message{Type: kind, Headers: map[dbus.HeaderField]dbus.Variant{}}
}

func (m *Manager) isReloaded(wait time.Duration) bool {
	select {
	case <-m.Reloaded():
		return true
	case <-time.After(wait):
		return false
	}
}

func TestCalls(t *testing.T) {
	m, p := newPeer(t, success)
	properties := []Property{{"MemoryHigh", uint64(4096)}, {"AllowedCPUs", []byte{3}}}
	if err := m.SetProperties(t.Context(), "docker-a.scope", properties); err != nil {
		t.Fatal(err)
	}
	if err := m.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	got, want := strings.Join(p.calls, "\n"), "SetUnitProperties [docker-a.scope true "+
		"[[MemoryHigh @t 4096] [AllowedCPUs @ay [0x3]]]]\nPing []"
	if got != want || len(p.conns) != 1 {
		t.Errorf("%d connections with calls\n%s\nwant\n%s", len(p.conns), got, want)
	}
}

func TestErrors(t *testing.T) {
	var name string
	m, _ := newPeer(t, func(*dbus.Message) *dbus.Message {
		r := reply(dbus.TypeError)
		r.Headers[dbus.FieldErrorName] = dbus.MakeVariant(name)
		r.Body = []any{"the reason"}
		return r
	})

	for n, kind := range map[string]func(error) bool{
		noSuchUnit:       errdefs.IsNotFound,
		invalidArguments: errdefs.IsInvalidArgument,
		unknownProperty:  errdefs.IsInvalidArgument,
		"org.freedesktop.DBus.Error.AccessDenied": errdefs.IsUnavailable,
	} {
		t.Run(n, func(t *testing.T) {
			name = n
			err := m.SetProperties(t.Context(), "a.scope", nil)
			if !kind(err) || !strings.Contains(err.Error(), "a.scope: the reason") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestReloads: a reload ends with one signal, and a lost connection may have hidden one.
func TestReloads(t *testing.T) {
	m, p := newPeer(t, success)
	if err := m.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}

	p.signal(t, "Reloading", true)
	p.signal(t, "UnitNew", "a.service")
	if m.isReloaded(100 * time.Millisecond) {
		t.Error("other signals count as the end of a reload")
	}

	for range 3 {
		p.signal(t, "Reloading", false)
	}
	if !m.isReloaded(10 * time.Second) {
		t.Error("the end of a reload was missed")
	}
	if err := m.Sync(t.Context()); err != nil { // its answer follows the signals
		t.Fatal(err)
	}
	select {
	case <-m.Reloaded(): // the other signals
	default:
	}

	for range 2 { // reconnected by Run, without a call
		p.disconnect()
		if !m.isReloaded(10 * time.Second) {
			t.Fatal("the loss of the connection was not reported")
		}
	}

	if err := m.Sync(t.Context()); err != nil {
		t.Errorf("call after the loss: %v", err)
	}
}

// TestCallsAtReexecution: calls that meet the end of a connection, before or after systemd has read
// them, succeed on the next connection.
func TestCallsAtReexecution(t *testing.T) {
	var p *peer
	var m *Manager
	var lose atomic.Bool
	m, p = newPeer(t, func(m *dbus.Message) *dbus.Message {
		if lose.Swap(false) {
			p.disconnect()
			return nil
		}
		return success(m)
	})

	for i := range 60 {
		switch i % 3 {
		case 0:
			lose.Store(true)
		case 1:
			p.disconnect()
		}

		if err := m.Sync(t.Context()); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
}

// TestNoAnswer: calls end with their context, whatever systemd does.
func TestNoAnswer(t *testing.T) {
	silent, _ := newPeer(t, func(*dbus.Message) *dbus.Message { return nil })

	socket := filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", socket) // accepts no connection: the authentication does not begin
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	for name, m := range map[string]*Manager{"call": silent, "authentication": New(socket, discard)} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := m.Sync(ctx); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
		})
	}

	if err := New(filepath.Join(t.TempDir(), "none"), discard).Sync(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("call without systemd: %v", err)
	}
}

func TestClose(t *testing.T) {
	called := make(chan struct{}, 1)
	m, _ := newPeer(t, func(*dbus.Message) *dbus.Message { called <- struct{}{}; return nil })
	result := make(chan error)
	go func() { result <- m.Sync(t.Context()) }()
	<-called
	if err := m.Close(); err != nil {
		t.Error(err)
	}

	if err := <-result; !errdefs.IsUnavailable(err) {
		t.Errorf("call during Close: %v", err)
	}
	if err := m.Sync(t.Context()); !errdefs.IsUnavailable(err) || !errors.Is(err, net.ErrClosed) {
		t.Errorf("call after Close: %v", err)
	}
	if m.isReloaded(50 * time.Millisecond) {
		t.Error("Close counts as a reload")
	}
}
