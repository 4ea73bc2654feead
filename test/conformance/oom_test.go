package conformance

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// newOOMHidingProxy serves an engine without OOM information on another socket, as with missing OOM
// events of containerd. While isLate is set, the daemon learns of starts after a second, as on a
// busy node. It returns the socket.
func (n *node) newOOMHidingProxy(t *testing.T, isLate *atomic.Bool) string {
	t.Helper()
	engine, socket := n.own(t).Socket, filepath.Join(n.tempDir(t), "proxy.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "engine"})
	forward.FlushInterval = -1 // events
	forward.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", engine)
	}}
	forward.ModifyResponse = func(r *http.Response) error {
		switch {
		case strings.HasSuffix(r.Request.URL.Path, "/events"):
			r.Body = withoutOOM(r.Body, isLate)
		case strings.HasSuffix(r.Request.URL.Path, "/start"):
			beLate(isLate)
		case strings.HasSuffix(r.Request.URL.Path, "/json"):
			b, err := io.ReadAll(r.Body)
			if err != nil {
				return err
			}
			b = bytes.ReplaceAll(b, []byte(`"OOMKilled":true`), []byte(`"OOMKilled":false`))
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
			r.Header.Del("Content-Length")
		}

		return nil
	}

	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: forward}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	return socket
}

func beLate(isLate *atomic.Bool) {
	if isLate.Load() {
		time.Sleep(time.Second)
	}
}

// withoutOOM removes OOM events from an event stream.
func withoutOOM(events io.ReadCloser, isLate *atomic.Bool) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		defer events.Close()

		in := bufio.NewReader(events)
		for {
			line, err := in.ReadBytes('\n')
			if bytes.Contains(line, []byte(`"start"`)) {
				beLate(isLate)
			}
			if !bytes.Contains(line, []byte(`"oom"`)) {
				if _, err := w.Write(line); err != nil {
					return
				}
			}

			if err != nil {
				w.CloseWithError(err)
				return
			}
		}
	}()

	return r
}

// exhaustMemory is a script that exceeds a memory limit.
const exhaustMemory = "x=aaaaaaaaaaaaaaaa; while true; do x=$x$x; done"

// TestOOMWithoutTheEngine reads OOM kills from the kernel while the engine reports none. Exits with
// another reason keep it.
func TestOOMWithoutTheEngine(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t, "--docker-endpoint=unix://"+n.newOOMHidingProxy(t, new(atomic.Bool)))
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		run := func(name, script string) string {
			cc := n.containerConfig(sh("until [ -e /go ]; do sleep 0.1; done; " + script))
			cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
			cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
			return n.startConfig(t, pod, cfg, cc)
		}

		assertEnd := func(id, reason string, code int32) {
			t.Helper()
			var s *runtimeapi.ContainerStatus
			if !within(time.Minute, func() bool {
				s = n.containerStatus(t, id)
				return s.Reason == reason
			}) || s.ExitCode != code {
				t.Errorf("reason %s and exit code %d, want %s and %d", s.Reason, s.ExitCode, reason, code)
			}
		}

		main := run("main", exhaustMemory)
		n.exec(t, main, "touch", "/go")
		assertEnd(main, "OOMKilled", 137)
		if n.inspect(t, main, ".State.OOMKilled") != "true" {
			t.Error("the engine did not record the OOM kill")
		}

		child := run("child", "("+exhaustMemory+"); sleep 1; exit 0")
		n.exec(t, child, "touch", "/go")
		assertEnd(child, "Completed", 0)

		stopped := run("stopped", "trap '' TERM; while :; do sleep 1; done")
		n.stop(t, stopped, 0)
		assertEnd(stopped, "Error", 137)

		killed := run("killed", ":")
		n.run(t, "kill", "-9", n.inspect(t, killed, ".State.Pid"))
		assertEnd(killed, "Error", 137)
	})
}

// TestOOMBeforeTheWatch kills containers before the daemon learns of their start, and removes their
// control groups. The kernel knows of the kill: in the counter of the pod (cgroup v2) or in its
// log, to which it writes ten kills of the machine in five seconds.
func TestOOMBeforeTheWatch(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		var isLate atomic.Bool
		n.Daemon = n.eng.Daemon(t, "--docker-endpoint=unix://"+n.newOOMHidingProxy(t, &isLate))
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		isLate.Store(true)

		var reasons []string
		for i := range 10 {
			cc := n.containerConfig(sh(exhaustMemory))
			cc.Metadata.Name = fmt.Sprint("c", i)
			cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
			s := n.waitExited(t, n.startConfig(t, pod, cfg, cc))
			if s.ExitCode == 137 && s.Reason == "OOMKilled" {
				return
			}
			reasons = append(reasons, s.Reason)
		}

		t.Errorf("reasons of OOM kills: %q, want OOMKilled once at least", reasons)
	})
}
