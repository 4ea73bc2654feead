package connlimit

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// listen returns a listener on loopback, and a dial function for both ends of a new connection.
func listen(t *testing.T, limits Limits) (l *Listener, dial func() (client net.Conn, server *Conn)) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	l = New(inner, limits)
	t.Cleanup(func() { l.Close(); l.CloseAll() })

	return l, func() (net.Conn, *Conn) {
		t.Helper()
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { client.Close() })
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}

		return client, server.(*Conn)
	}
}

// readResponse reads the server's response, and reports whether the server has closed the
// connection.
func readResponse(t *testing.T, client net.Conn) (response string, closed bool) {
	t.Helper()
	if err := client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}

	b, err := io.ReadAll(client)
	return string(b), err == nil
}

func TestOldestPendingIsClosed(t *testing.T) {
	for name, limits := range map[string]Limits{
		"total":    {Pending: 2, Response: []byte("busy")},
		"per peer": {PendingPerPeer: 2, Response: []byte("busy")},
	} {
		t.Run(name, func(t *testing.T) {
			_, dial := listen(t, limits)
			first, _ := dial()
			second, touched := dial()
			_, kept := dial() // closes first
			if response, closed := readResponse(t, first); !closed || response != "busy" {
				t.Errorf("oldest connection: response %q, closed %v; want \"busy\", true", response, closed)
			}
			if err := kept.Keep(); err != nil {
				t.Fatal(err)
			}

			third, _ := dial()
			touched.Touch()
			fourth, _ := dial() // closes third
			for c, want := range map[net.Conn]bool{second: false, third: true, fourth: false} {
				if _, closed := readResponse(t, c); closed != want {
					t.Errorf("closed %v, want %v", closed, want)
				}
			}
		})
	}
}

func TestKeptAreBounded(t *testing.T) {
	for name, limits := range map[string]Limits{"total": {Kept: 1}, "per peer": {KeptPerPeer: 1}} {
		t.Run(name, func(t *testing.T) {
			l, dial := listen(t, limits)
			_, first := dial()
			_, second := dial()
			if err := errors.Join(first.Keep(), first.Keep()); err != nil {
				t.Fatal(err)
			}

			if err := second.Keep(); !errors.Is(err, ErrTooMany) {
				t.Errorf("Keep beyond the limit: %v", err)
			}

			first.Close()
			if err := second.Keep(); err != nil {
				t.Errorf("Keep after another connection was closed: %v", err)
			}

			if err := first.Keep(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Keep of a closed connection: %v", err)
			}

			second.Close()
			second.Close()
			if l.number.kept != 0 || l.number.pending != 0 || len(l.open)+len(l.kept)+len(l.pending) != 0 {
				t.Errorf("counters after all connections closed: %+v, %v, %v", l.number, l.kept, l.pending)
			}
		})
	}
}

func TestCloseAll(t *testing.T) {
	l, dial := listen(t, Limits{})
	client, _ := dial()
	l.CloseAll()
	if _, closed := readResponse(t, client); !closed {
		t.Error("connection is open after CloseAll")
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}

	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after CloseAll: %v", err)
	}
}

func TestPeerOf(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:9":         "127.0.0.1",
		"[::ffff:10.0.0.1]:9": "10.0.0.1",
		"[::1]:9":             "::1",
		"[2001:db8::1:2]:9":   "2001:db8::",
		"[fe80::1%eth0]:9":    "fe80::",
	} {
		t.Run(addr, func(t *testing.T) {
			a, err := net.ResolveTCPAddr("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}

			if got := peerOf(a).String(); got != want {
				t.Errorf("peerOf(%s) = %s, want %s", addr, got, want)
			}
		})
	}
}
