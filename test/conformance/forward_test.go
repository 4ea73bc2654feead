package conformance

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"cri-dockerd/test/engines"
)

// forwardSession opens a port-forward session of a pod over SPDY, like the API server.
func (n *node) forwardSession(t *testing.T, pod string) httpstream.Connection {
	t.Helper()
	r, err := n.Runtime.PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	session, _ := n.openSPDY(t, r.Url, "portforward.k8s.io")
	return session
}

// openSPDY opens a session at a URL of the streaming server. It also returns the underlying
// connection.
func (n *node) openSPDY(t *testing.T, raw, protocol string) (session httpstream.Connection, conn net.Conn) {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}

	if conn, err = n.DialContext(t.Context(), "tcp", u.Host); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+
		"X-Stream-Protocol-Version: %s\r\n\r\n", u.RequestURI(), u.Host, protocol)
	resp, err := http.ReadResponse(bufio.NewReader(byteReader{conn}), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%s: %v, %v", raw, resp, err)
	}

	if session, err = spdy.NewClientConnection(conn); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { session.Close() })

	return session, conn
}

// byteReader reads single bytes, so that a buffered reader does not consume bytes after the header
// of a response.
type byteReader struct{ io.Reader }

func (r byteReader) Read(p []byte) (int, error) { return r.Reader.Read(p[:1]) }

// connectPort opens one connection to a port.
func connectPort(session httpstream.Connection, id, port int) (data, errs httpstream.Stream, err error) {
	stream := func(kind string) (httpstream.Stream, error) {
		h := http.Header{}
		h.Set("streamType", kind)
		h.Set("port", strconv.Itoa(port))
		h.Set("requestID", strconv.Itoa(id))
		return session.CreateStream(h)
	}
	if errs, err = stream("error"); err != nil {
		return nil, nil, err
	}

	data, err = stream("data")

	return data, errs, err
}

// unacceptingPort opens a port on the pod's loopback address with a listener that never accepts. A
// first connection fills its queue.
func (n *node) unacceptingPort(t *testing.T, pod string) int {
	t.Helper()
	var fd int
	err := engines.In(n.own(t).NetNS(n.Pin(t, pod)), func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0))
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { unix.Close(fd) })
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}

	port := sa.(*unix.SockaddrInet4).Port
	filler, err := engines.Dial(t.Context(), n.own(t).NetNS(n.Pin(t, pod)), "tcp",
		net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { filler.Close() })

	return port
}

// probeCalls makes calls until ctx ends and returns their durations.
func (n *node) probeCalls(ctx context.Context, t *testing.T) (took []time.Duration) {
	for ctx.Err() == nil {
		for _, call := range []func() error{
			func() error { _, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); return err },
			func() error {
				_, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
				return err
			},
		} {
			begin := time.Now()
			if err := call(); err != nil {
				t.Error(err)
			}
			took = append(took, time.Since(begin))
		}

		time.Sleep(10 * time.Millisecond)
	}

	return took
}

// TestForwardsToAnUnacceptingPort opens 10,000 connections to a port with a full accept queue. They
// block neither threads nor other calls, and other connections of the same session work.
func TestForwardsToAnUnacceptingPort(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		const connections, sessions, atATime = 10_000, 4, 25
		const pause = 10 * time.Millisecond // limits the load of the test itself
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg,
			sh("mkdir /www; echo forwarded page > /www/index.html; exec httpd -f -p 127.0.0.1:8099 -h /www"))
		port := n.unacceptingPort(t, pod)
		all := make([]httpstream.Connection, sessions)
		for i := range all {
			all[i] = n.forwardSession(t, pod)
		}

		ctx, stop := context.WithCancel(t.Context())
		var probes sync.WaitGroup
		var took []time.Duration
		probes.Go(func() { took = n.probeCalls(ctx, t) })
		var most atomic.Int64
		probes.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(200 * time.Millisecond) {
				most.Store(max(most.Load(), int64(n.Threads(t))))
			}
		})

		var next atomic.Int64
		var clients sync.WaitGroup
		for i := range sessions * atATime {
			clients.Go(func() {
				for id := int(next.Add(1)); id <= connections; id = int(next.Add(1)) {
					data, errs, err := connectPort(all[i%sessions], id, port)
					if err != nil {
						t.Errorf("connection %d: %v", id, err)
						return
					}

					// A client like kubectl would end its session if it received a text.
					if text, _ := io.ReadAll(errs); len(text) > 0 {
						t.Errorf("connection %d: %s", id, text)
						return
					}

					_ = errs.Close()
					_ = data.Reset()
					time.Sleep(pause)
				}
			})
		}

		clients.Wait()
		stop()
		probes.Wait()

		if most.Load() >= 100 {
			t.Errorf("the daemon had %d threads, want fewer than 100", most.Load())
		}

		slices.Sort(took)
		share := func(percent int) time.Duration { return took[(len(took)-1)*percent/100] }
		t.Logf("%d calls: median %v, 95 %% within %v, 99 %% within %v, slowest %v; %d threads",
			len(took), share(50), share(95), share(99), share(100), most.Load())
		// Other tests share the processors, so the suite limits the median only.
		if typical := share(50); typical > strictStatus {
			t.Errorf("median of the calls %v, want at most %v", typical, strictStatus)
		}
		if *strict && share(99) > strictStatus {
			t.Errorf("99th percentile of the calls %v, want at most %v", share(99), strictStatus)
		}

		for i, session := range all {
			n.fetch(t, session, connections+1+i)
		}
	})
}

// fetch fetches the page of the pod's web server through a session.
func (n *node) fetch(t *testing.T, session httpstream.Connection, id int) {
	t.Helper()
	var page []byte
	eventually(t, "page from the forwarded port", func() bool {
		data, _, err := connectPort(session, id, 8099)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = data.Reset() }()

		if _, err := io.WriteString(data, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			return false
		}

		page, _ = io.ReadAll(data)

		return strings.Contains(string(page), "forwarded page")
	})
}
