package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"cri-dockerd/test/engines"
)

// streamsCommand runs the program as the benchmark of exec and port-forward.
const streamsCommand = "streams"

const (
	execShare     = 0.8  // of the engine's own exec, in bytes a second
	execSyncShare = 1.05 // of the engine's own exec, in time
	streamsPort   = 8099 // of the web server in the pod
)

// streamsBench measures on one engine. The ways that are compared take turns.
type streamsBench struct {
	h         *harness
	engine    *engines.Engine
	daemon    *engines.Daemon
	docker    *client.Client
	pod, id   string
	megabytes int
}

// benchStreams does one run for each engine and says whether all limits hold.
func benchStreams(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(streamsCommand, flag.ExitOnError)
	size := flags.Int("megabytes", 200, "size of each stream")
	rounds := flags.Int("rounds", 5, "streams of each kind")
	sessions := flags.Int("sessions", 100, "sessions at once")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}
	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		b := newStreamsBench(ctx, h, v, *size)
		fmt.Printf("Docker Engine %s, %d streams of %d MB, %d CPUs, load average %s before the run, %s\n\n",
			v, *rounds, *size, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = b.run(ctx, *rounds, *sessions) && ok
	}
	return ok
}

func newStreamsBench(ctx context.Context, h *harness, v engines.Version, megabytes int) *streamsBench {
	e := engines.Start(h, v)
	image := e.ImportBusybox(h)
	d := e.Daemon(h, "--log-level=info")
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "streams", Namespace: "bench", Uid: "streams"},
		LogDirectory: e.Dir + "/logs",
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: e.CgroupParent},
	}
	pod, err := d.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		h.Fatalf("bench: %v", err)
	}
	serve := fmt.Sprintf("mkdir /www; head -c %d000000 /dev/zero > /www/zeros; exec httpd -f -p 127.0.0.1:%d -h /www", megabytes, streamsPort)
	c, err := d.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod.PodSandboxId,
		SandboxConfig: cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: image},
			Command:  []string{"sh", "-c", serve},
			LogPath:  "main.log",
		},
	})
	if err == nil {
		_, err = d.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	}
	if err != nil {
		h.Fatalf("bench: %v", err)
	}
	b := &streamsBench{
		h:         h,
		engine:    e,
		daemon:    d,
		docker:    e.Docker(h),
		pod:       pod.PodSandboxId,
		id:        c.ContainerId,
		megabytes: megabytes,
	}
	listens := func() bool { _, err := b.forward(ctx, 0); return err == nil }
	if !engines.Within(time.Minute, listens) {
		h.Fatalf("bench: the web server of the pod does not answer")
	}
	return b
}

// run prints the table.
func (b *streamsBench) run(ctx context.Context, rounds, sessions int) bool {
	ways := []struct {
		name   string
		stream func(ctx context.Context, megabytes int) (int64, error)
	}{
		{"the engine's exec", b.engineExec},
		{"exec, SPDY", b.execSPDY},
		{"exec, WebSocket", b.execWebSocket},
		{"port-forward, SPDY", b.forward},
	}
	rates := make([][]time.Duration, len(ways)) // times
	for range rounds {
		for i, w := range ways {
			begin := time.Now()
			if n, err := w.stream(ctx, b.megabytes); err != nil || n < int64(b.megabytes)*1e6 {
				b.h.Fatalf("bench: %s: %d bytes, %v", w.name, n, err)
			}
			rates[i] = append(rates[i], time.Since(begin))
		}
	}

	ok := true
	fmt.Println("| stream | MB/s, median | of the engine's exec | limit | verdict |\n|---|---:|---:|---|---|")
	rate := func(i int) float64 { return float64(b.megabytes) / quantile(rates[i], 50).Seconds() }
	for i, w := range ways {
		limit, verdict := "", ""
		if strings.HasPrefix(w.name, "exec") {
			limit, verdict = fmt.Sprintf("≥ %.2f", execShare), "pass"
			if rate(i) < execShare*rate(0) {
				verdict, ok = "FAIL", false
			}
		}
		fmt.Printf("| %s | %.0f | %.2f | %s | %s |\n", w.name, rate(i), rate(i)/rate(0), limit, verdict)
	}

	begin, each := time.Now(), max(1, b.megabytes/sessions)
	g, gctx := errgroup.WithContext(ctx)
	for range sessions {
		g.Go(func() error { _, err := b.execSPDY(gctx, each); return err })
	}
	if err := g.Wait(); err != nil {
		b.h.Fatalf("bench: %d sessions at once: %v", sessions, err)
	}
	fmt.Printf("| %d sessions at once, %d MB each | %.0f | | | |\n\n", sessions, each, float64(sessions*each)/time.Since(begin).Seconds())
	return b.execSyncs(ctx, 20*rounds) && ok
}

// execSyncs compares ExecSync with the engine's own exec.
func (b *streamsBench) execSyncs(ctx context.Context, calls int) bool {
	var ours, theirs []time.Duration
	for range calls {
		begin := time.Now()
		if _, err := b.daemon.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: b.id, Cmd: []string{"/bin/true"}}); err != nil {
			b.h.Fatalf("bench: ExecSync: %v", err)
		}
		ours = append(ours, time.Since(begin))
		begin = time.Now()
		if _, err := b.runExec(ctx, []string{"/bin/true"}); err != nil {
			b.h.Fatalf("bench: exec: %v", err)
		}
		theirs = append(theirs, time.Since(begin))
	}
	share := quantile(ours, 50).Seconds() / quantile(theirs, 50).Seconds()
	verdict := "pass"
	if share > execSyncShare {
		verdict = "FAIL"
	}
	fmt.Println("| /bin/true | p50 | n | of the engine's exec | limit | verdict |\n|---|---:|---:|---:|---|---|")
	fmt.Printf("| the engine's exec | %s | %d | | | |\n", ms(quantile(theirs, 50)), calls)
	fmt.Printf("| ExecSync | %s | %d | %.2f | ≤ %.2f | %s |\n\n", ms(quantile(ours, 50)), calls, share, execSyncShare, verdict)
	return verdict == "pass"
}

func zeros(megabytes int) []string {
	return []string{"head", "-c", fmt.Sprint(megabytes * 1e6), "/dev/zero"}
}

func (b *streamsBench) engineExec(ctx context.Context, megabytes int) (int64, error) {
	return b.runExec(ctx, zeros(megabytes))
}

// runExec runs a command as "docker exec" does and returns the size of its output.
func (b *streamsBench) runExec(ctx context.Context, cmd []string) (int64, error) {
	x, err := b.docker.ExecCreate(ctx, b.id, client.ExecCreateOptions{Cmd: cmd, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return 0, err
	}
	conn, err := b.docker.ExecAttach(ctx, x.ID, client.ExecAttachOptions{})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	n, err := stdcopy.StdCopy(io.Discard, io.Discard, conn.Reader)
	if err != nil {
		return n, err
	}
	in, err := b.docker.ExecInspect(ctx, x.ID, client.ExecInspectOptions{})
	if err == nil && in.ExitCode != 0 {
		err = fmt.Errorf("exit code %d", in.ExitCode)
	}
	return n, err
}

func (b *streamsBench) execURL(ctx context.Context, megabytes int) (*url.URL, error) {
	r, err := b.daemon.Runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: b.id, Cmd: zeros(megabytes), Stdout: true})
	if err != nil {
		return nil, err
	}
	return url.Parse(r.Url)
}

func (b *streamsBench) execWebSocket(ctx context.Context, megabytes int) (int64, error) {
	u, err := b.execURL(ctx, megabytes)
	if err != nil {
		return 0, err
	}
	u.Scheme = "ws"
	d := websocket.Dialer{
		Subprotocols: []string{"v5.channel.k8s.io"},
		NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return b.engine.DialContext(ctx, network, addr)
		},
		ReadBufferSize: 64 << 10,
	}
	c, _, err := d.DialContext(ctx, u.String(), nil)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	for total := int64(0); ; {
		_, m, err := c.NextReader()
		if err != nil {
			return total, err
		}
		var channel [1]byte
		if _, err := io.ReadFull(m, channel[:]); err != nil {
			return total, err
		}
		if channel[0] == 3 {
			return total, successOf(m)
		}
		n, err := io.Copy(io.Discard, m)
		if err != nil {
			return total, err
		}
		total += n
	}
}

// successOf reads the status that ends a session.
func successOf(r io.Reader) error {
	status, err := io.ReadAll(r)
	if err == nil && !strings.Contains(string(status), "Success") {
		err = errors.New(string(status))
	}
	return err
}

// openSPDY opens a session.
func (b *streamsBench) openSPDY(ctx context.Context, u *url.URL, protocol string) (httpstream.Connection, error) {
	conn, err := b.engine.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: %s\r\n\r\n",
		u.RequestURI(), u.Host, protocol)
	resp, err := http.ReadResponse(bufio.NewReader(byByte{conn}), nil)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, errors.Join(errors.New(resp.Status), conn.Close())
	}
	return spdy.NewClientConnection(conn)
}

// byByte keeps a buffered reader from reading beyond the header of a response.
type byByte struct{ io.Reader }

func (r byByte) Read(p []byte) (int, error) { return r.Reader.Read(p[:1]) }

func (b *streamsBench) execSPDY(ctx context.Context, megabytes int) (int64, error) {
	u, err := b.execURL(ctx, megabytes)
	if err != nil {
		return 0, err
	}
	session, err := b.openSPDY(ctx, u, "v4.channel.k8s.io")
	if err != nil {
		return 0, err
	}
	defer session.Close()
	status, err := session.CreateStream(http.Header{"Streamtype": {"error"}})
	if err != nil {
		return 0, err
	}
	out, err := session.CreateStream(http.Header{"Streamtype": {"stdout"}})
	if err != nil {
		return 0, err
	}
	read := make(chan int64, 1)
	go func() { n, _ := io.Copy(io.Discard, out); read <- n }()
	err = successOf(status)
	return <-read, err
}

// forward gets the file of the pod's web server through a port, or the beginning of the answer alone.
func (b *streamsBench) forward(ctx context.Context, megabytes int) (int64, error) {
	r, err := b.daemon.Runtime.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: b.pod})
	if err != nil {
		return 0, err
	}
	u, err := url.Parse(r.Url)
	if err != nil {
		return 0, err
	}
	session, err := b.openSPDY(ctx, u, "portforward.k8s.io")
	if err != nil {
		return 0, err
	}
	defer session.Close()
	header := http.Header{"Streamtype": {"error"}, "Port": {fmt.Sprint(streamsPort)}, "Requestid": {"1"}}
	if _, err := session.CreateStream(header.Clone()); err != nil {
		return 0, err
	}
	header.Set("Streamtype", "data")
	data, err := session.CreateStream(header)
	if err != nil {
		return 0, err
	}
	fmt.Fprint(data, "GET /zeros HTTP/1.0\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReaderSize(data, 64<<10), nil)
	if err != nil {
		return 0, err
	}
	if resp.ContentLength < int64(b.megabytes)*1e6 {
		return 0, fmt.Errorf("%s: %d bytes", resp.Status, resp.ContentLength)
	}
	if megabytes == 0 {
		return 0, nil
	}
	defer resp.Body.Close()
	return io.Copy(io.Discard, resp.Body)
}
