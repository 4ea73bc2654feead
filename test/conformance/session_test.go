package conformance

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// execDelayer is a proxy between a daemon and its engine. It holds requests to start an exec until
// it is released, and forwards them even if their clients have disconnected.
type execDelayer struct {
	socket  string
	held    chan struct{} // buffer of 1: receives a value for each held request
	release chan struct{} // closed by the test
	ended   chan struct{} // closed when the engine has ended an exec
}

func (n *node) newExecDelayer(t *testing.T) *execDelayer {
	t.Helper()
	engine := n.own(t).Socket
	p := &execDelayer{
		socket:  filepath.Join(n.tempDir(t), "late.sock"),
		held:    make(chan struct{}, 1),
		release: make(chan struct{}),
		ended:   make(chan struct{}),
	}

	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}

	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", engine)
	}
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "engine"})
	forward.FlushInterval = -1 // events
	forward.Transport = &http.Transport{DialContext: dial}
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.Contains(r.URL.Path, "/exec/") || !strings.HasSuffix(r.URL.Path, "/start") {
				forward.ServeHTTP(w, r)
				return
			}

			body, _ := io.ReadAll(r.Body)
			p.held <- struct{}{}
			<-p.release
			defer close(p.ended)

			conn, err := dial(context.Background(), "", "")
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()

			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"+
				"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", r.URL.Path, len(body), body)
			_, _ = io.Copy(io.Discard, conn)
		}),
	}

	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	return p
}

// TestLateExec has the engine start a command long after the call has timed out. The command is
// killed.
func TestLateExec(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := n.newExecDelayer(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		_, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         sh("sleep 4321 & sleep 4322"),
			Timeout:     1,
		})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("ExecSync: %v", err)
		}

		<-p.held
		close(p.release)
		select {
		case <-p.ended:
		case <-time.After(scaled(time.Minute)):
			t.Error("the command was not killed within a minute")
		}

		eventually(t, "end of the command's processes", func() bool {
			return !strings.Contains(n.docker(t, "top", id), "sleep 432")
		})
	})
}

// TestStalledClient has an attach and an exec session without a reading client. They block neither
// the container and its log nor its stop and removal. The slow client is disconnected.
func TestStalledClient(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		forBothProtocols(t, func(t *testing.T, protocol string) {
			cfg := n.podConfig(t)
			pod := n.runPod(t, cfg)
			const flood = "while [ ! -e /go ]; do sleep 0.1; done; yes " +
				"0123456789012345678901234567890123456789012345678901234567890123456789" +
				" | head -c 120000000; echo; echo all printed; sleep 1000"
			id := n.start(t, pod, cfg, sh(flood))
			attached := n.openSession(t, protocol, n.attachURL(t, id, false), false, false)
			n.openSession(t, protocol, n.execURL(t, id, false, sh("yes")), false, false)
			n.exec(t, id, "touch", "/go")
			log := filepath.Join(cfg.LogDirectory, "main_0.log")
			if !within(2*time.Minute, func() bool {
				return strings.Contains(n.run(t, "tail", "-n1", log), "all printed")
			}) {
				t.Errorf("the container is blocked: its log ends with %q", n.run(t, "tail", "-n1", log))
			}

			begin := time.Now()
			n.stop(t, id, 1)
			n.stopPod(t, pod)
			n.removePod(t, pod)
			if took := time.Since(begin); took > scaled(30*time.Second) {
				t.Errorf("stop and removal took %v, want at most 30 s", took)
			}
			if _, end := attached.read(); !strings.Contains(end, "buffer is full") {
				t.Errorf("status of the attach session: %q, want a full buffer", end)
			}
		})
	})
}

// TestSlowReaderGetsAll starts to read seconds after the end of the command. The client gets all of
// its output.
func TestSlowReaderGetsAll(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		forBothProtocols(t, func(t *testing.T, protocol string) {
			const size = 30_000_000 // exceeds all buffers
			s := n.openSession(t, protocol,
				n.execURL(t, id, false, sh(fmt.Sprintf("yes | head -c %d; touch /end", size))), false, false)
			eventually(t, "end of the command", func() bool {
				r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
					ContainerId: id,
					Cmd:         []string{"rm", "/end"},
					Timeout:     20,
				})
				return err == nil && r.ExitCode == 0
			})

			time.Sleep(3 * time.Second) // the engine closes the stream after 2 s
			out, end := s.read()
			if state, _ := parseStatus(t, end); len(out) != size || state != "Success" {
				t.Errorf("got %d of %d bytes, status %s", len(out), size, end)
			}
		})
	})
}

// TestSessionsEndWithTheirContainer stops a container with sessions in every PID mode, and a pod
// with a port-forward.
func TestSessionsEndWithTheirContainer(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		for _, mode := range []runtimeapi.NamespaceMode{
			runtimeapi.NamespaceMode_CONTAINER,
			runtimeapi.NamespaceMode_POD,
			runtimeapi.NamespaceMode_NODE,
		} {
			t.Run(mode.String(), func(t *testing.T) {
				t.Parallel()
				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext.NamespaceOptions.Pid = mode
				cc := n.containerConfig(sh("trap 'exit 0' TERM; while true; do sleep 0.1; done"))
				cc.Linux.SecurityContext.NamespaceOptions.Pid = mode
				pod := n.runPod(t, cfg)
				id := n.startConfig(t, pod, cfg, cc)
				ended := make(chan string, 3)
				go func() {
					_, err := n.Runtime.ExecSync(t.Context(),
						&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: sh("touch /sync; sleep 4331")})
					ended <- fmt.Sprintf("ExecSync: %v", err)
				}()

				shellURL := n.execURL(t, id, true, sh("touch /shell; sleep 4332"))
				shell := n.openSession(t, "WebSocket", shellURL, true, true)
				go func() { _, end := shell.read(); ended <- "terminal: " + end }()
				attached := n.openSession(t, "SPDY", n.attachURL(t, id, false), false, false)
				go func() { _, end := attached.read(); ended <- "attach: " + end }()
				forwarded := n.forwardSession(t, pod)
				n.exec(t, id, sh("while [ ! -e /sync -o ! -e /shell ]; do sleep 0.1; done")...)

				n.stop(t, id, 5)
				for range 3 {
					select {
					case status := <-ended:
						t.Log(status)
					case <-time.After(scaled(30 * time.Second)):
						t.Fatal("a session did not end within 30 s")
					}
				}

				n.stopPod(t, pod)
				select {
				case <-forwarded.CloseChan():
				case <-time.After(scaled(30 * time.Second)):
					t.Error("the port-forward did not end within 30 s")
				}
			})
		}
	})
}

// TestLostTerminalIsHungUp disconnects the client of a shell: the shell ends.
func TestLostTerminalIsHungUp(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		forBothProtocols(t, func(t *testing.T, protocol string) {
			s := n.openSession(t, protocol, n.execURL(t, id, true, sh("echo ready; sleep 4341; true")), true, true)
			s.await(t, "ready")
			s.hangUp()
			eventually(t, "end of the shell", func() bool {
				return !strings.Contains(n.exec(t, id, "ps"), "sleep 4341")
			})
		})
	})
}

// TestControlKeys sends every control key to a program on a terminal, including Docker's detach
// keys.
func TestControlKeys(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		const show = "stty raw -echo; echo ready; dd bs=1 count=35 2>/dev/null | hexdump -ve '1/1 \"%02x\"'"
		keys, want := "\x10\x11\x10", "101110"
		for b := range byte(32) {
			keys, want = keys+string(rune(b)), want+fmt.Sprintf("%02x", b)
		}

		check := func(t *testing.T, s *session) {
			s.await(t, "ready")
			for _, key := range keys {
				s.write(string(key))
			}
			s.await(t, want)
		}

		id := n.start(t, pod, cfg, sh("sleep 1000"))
		forBothProtocols(t, func(t *testing.T, protocol string) {
			t.Run("exec", func(t *testing.T) {
				check(t, n.openSession(t, protocol, n.execURL(t, id, true, sh(show)), true, true))
			})
			t.Run("attach", func(t *testing.T) {
				cc := n.containerConfig(sh("read x; " + show))
				cc.Metadata.Name, cc.LogPath = protocol, protocol+"_0.log"
				cc.Stdin, cc.Tty = true, true
				s := n.openSession(t, protocol, n.attachURL(t, n.startConfig(t, pod, cfg, cc), true), true, true)
				s.write("\n")
				check(t, s)
			})
		})
	})
}

// TestTerminalSizeAtStart reads the terminal size in the first command. API 1.42 sets it before the
// start, API 1.41 shortly after.
func TestTerminalSizeAtStart(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cmd := []string{"stty", "size"}
		if !n.own(t).HasAPI(t, "1.42") {
			cmd = sh(`until stty size 2>/dev/null | grep "33 101"; do sleep 0.1; done`)
		}

		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		forBothProtocols(t, func(t *testing.T, protocol string) {
			s := n.openSession(t, protocol, n.execURL(t, id, true, cmd), true, true)
			s.resize(`{"Width":101,"Height":33}`)
			if out, end := s.read(); strings.TrimSpace(out) != "33 101" {
				t.Errorf("terminal size %q, status %s", out, end)
			}
		})
	})
}

// TestFailedForwardsLeaveTheSession forwards to a closed port. Only the connection ends. A text on
// its error stream would end the session of a client like kubectl.
func TestFailedForwardsLeaveTheSession(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg,
			sh("mkdir /www; echo forwarded page > /www/index.html; exec httpd -f -p 127.0.0.1:8099 -h /www"))
		session := n.forwardSession(t, pod)
		n.fetch(t, session, 1000)
		for i := range 20 {
			data, errs, err := connectPort(session, i, 1)
			if err != nil {
				t.Fatal(err)
			}

			text, _ := io.ReadAll(errs)
			if b, _ := io.ReadAll(data); len(text) > 0 || len(b) > 0 {
				t.Errorf("connection %d: error stream %q, data %q, want both empty", i, text, b)
			}
		}

		n.fetch(t, session, 1001)
	})
}

// TestEndlessProbes runs probes with endless output. The memory for the output of all calls
// together is limited.
func TestEndlessProbes(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		before := n.RSS(t)
		var probes sync.WaitGroup
		for range 10 {
			probes.Go(func() {
				_, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
					ContainerId: id,
					Cmd:         []string{"cat", "/dev/zero"},
					Timeout:     5,
				})
				if status.Code(err) != codes.DeadlineExceeded {
					t.Errorf("ExecSync: %v", err)
				}
			})
		}

		ended := make(chan struct{})
		go func() { probes.Wait(); close(ended) }()
		most := int64(0)
		for running := true; running; {
			select {
			case <-ended:
				running = false
			case <-time.After(200 * time.Millisecond):
				most = max(most, n.RSS(t))
			}
		}

		// The calls share 48 MiB. Without that limit memory grows by 423 MiB, with the race
		// detector by several times as much.
		limit := int64(160 << 20)
		if engines.Race() {
			limit *= 2
		}

		t.Logf("RSS grew from %d to %d MiB", before>>20, most>>20)
		if most-before > limit {
			t.Errorf("RSS grew by %d MiB, want at most %d", (most-before)>>20, limit>>20)
		}
	})
}
