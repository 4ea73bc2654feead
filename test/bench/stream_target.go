package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/gorilla/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"cri-dockerd/test/engines"
)

// streamsPort is the port of serveZeros in a pod.
const streamsPort = 8099

// streamTarget is a container of a CRI runtime with a client for exec and port-forward.
type streamTarget struct {
	runtime runtimeapi.RuntimeServiceClient
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	pod, id string
}

// netNSFunc returns the path of a pod's network namespace inside the engine's namespaces.
type netNSFunc func(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, pod string) (string, error)

// newStreamTarget starts a pod with a container of image, and a server in the pod's network
// namespace.
func newStreamTarget(ctx context.Context, h *harness, e *engines.Engine, name string,
	runtime runtimeapi.RuntimeServiceClient, image string, netNS netNSFunc,
) *streamTarget {
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "streams", Namespace: "bench", Uid: "streams"},
		LogDirectory: e.Dir + "/logs-" + name,
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: e.CgroupParent},
	}

	t := &streamTarget{runtime: runtime, dial: e.DialContext}
	pod, err := runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		h.Fatalf("bench: %s: %v", name, err)
	}

	t.pod = pod.PodSandboxId
	c, err := runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  t.pod,
		SandboxConfig: cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: image},
			Command:  []string{"sleep", "1000000"},
			LogPath:  "main.log",
		},
	})
	if err == nil {
		t.id = c.ContainerId
		_, err = runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: t.id})
	}

	if err != nil {
		h.Fatalf("bench: %s: %v", name, err)
	}

	path, err := netNS(ctx, runtime, t.pod)
	if err == nil {
		err = serveZeros(h, e.NetNS(path))
	}

	if err != nil {
		h.Fatalf("bench: %s: the server in the pod: %v", name, err)
	}

	return t
}

// serveZeros serves in a network namespace: a client sends a number in a line and receives as many
// zero bytes.
func serveZeros(h *harness, netns string) error {
	var l net.Listener
	err := engines.In(netns, func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", streamsPort))
		return err
	})
	if err != nil {
		return err
	}

	h.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go sendZeros(conn)
		}
	}()

	return nil
}

func sendZeros(conn net.Conn) {
	defer conn.Close()

	var remaining int
	if _, err := fmt.Fscanln(oneByteReader{conn}, &remaining); err != nil {
		return
	}

	zeros := make([]byte, 128<<10)
	for remaining > 0 {
		n, err := conn.Write(zeros[:min(remaining, len(zeros))])
		if err != nil {
			return
		}
		remaining -= n
	}
}

// execURL returns the URL of an exec with output.
func (t *streamTarget) execURL(ctx context.Context, cmd []string) (*url.URL, error) {
	r, err := t.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: t.id, Cmd: cmd, Stdout: true})
	if err != nil {
		return nil, err
	}
	return url.Parse(r.Url)
}

func (t *streamTarget) forwardURL(ctx context.Context) (*url.URL, error) {
	r, err := t.runtime.PortForward(ctx,
		&runtimeapi.PortForwardRequest{PodSandboxId: t.pod, Port: []int32{streamsPort}})
	if err != nil {
		return nil, err
	}
	return url.Parse(r.Url)
}

// execSPDY runs a command over SPDY and returns the size of its output in bytes.
func (t *streamTarget) execSPDY(ctx context.Context, cmd []string) (int64, error) {
	u, err := t.execURL(ctx, cmd)
	if err != nil {
		return 0, err
	}

	session, err := t.openSPDY(ctx, u, "v4.channel.k8s.io")
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
	err = checkSuccess(status)

	return <-read, err
}

// execWebSocket runs a command over a WebSocket and returns the size of its output in bytes.
func (t *streamTarget) execWebSocket(ctx context.Context, cmd []string) (int64, error) {
	u, err := t.execURL(ctx, cmd)
	if err != nil {
		return 0, err
	}

	c, err := t.openWebSocket(ctx, u, "v5.channel.k8s.io")
	if err != nil {
		return 0, err
	}
	defer c.Close()

	for total := int64(0); ; {
		channel, m, err := nextMessage(c)
		if err != nil {
			return total, err
		}

		if channel == 3 {
			return total, checkSuccess(m)
		}

		n, err := io.Copy(io.Discard, m)
		if err != nil {
			return total, err
		}

		total += n
	}
}

// forwardSPDY reads bytes from the pod's server through a port over SPDY.
func (t *streamTarget) forwardSPDY(ctx context.Context, bytes int) (int64, error) {
	u, err := t.forwardURL(ctx)
	if err != nil {
		return 0, err
	}

	session, err := t.openSPDY(ctx, u, "portforward.k8s.io")
	if err != nil {
		return 0, err
	}
	defer session.Close()

	header := http.Header{"Streamtype": {"error"}, "Port": {fmt.Sprint(streamsPort)}, "Requestid": {"1"}}
	failure, err := session.CreateStream(header.Clone())
	if err != nil {
		return 0, err
	}

	header.Set("Streamtype", "data")
	data, err := session.CreateStream(header)
	if err != nil {
		return 0, err
	}

	fmt.Fprintln(data, bytes)
	n, err := io.CopyN(io.Discard, data, int64(bytes))
	if err == io.EOF { //nolint:errorlint // io.CopyN's contract
		reason, _ := io.ReadAll(failure)
		err = fmt.Errorf("the stream ended early: %s", reason)
	}

	return n, err
}

// forwardWebSocket reads bytes from the pod's server through a port over a WebSocket.
func (t *streamTarget) forwardWebSocket(ctx context.Context, bytes int) (int64, error) {
	u, err := t.forwardURL(ctx)
	if err != nil {
		return 0, err
	}

	c, err := t.openWebSocket(ctx, u, "v4.channel.k8s.io")
	if err != nil {
		return 0, err
	}
	defer c.Close()

	for range 2 { // each channel starts with its port
		channel, m, err := nextMessage(c)
		if err != nil {
			return 0, err
		}

		var port uint16
		if err := binary.Read(m, binary.LittleEndian, &port); err != nil || port != streamsPort {
			return 0, fmt.Errorf("channel %d starts with port %d: %w", channel, port, err)
		}
	}

	if err := c.WriteMessage(websocket.BinaryMessage, fmt.Appendln([]byte{0}, bytes)); err != nil {
		return 0, err
	}

	total := int64(0)
	for total < int64(bytes) {
		channel, m, err := nextMessage(c)
		if err != nil {
			return total, err
		}

		if channel != 0 {
			reason, _ := io.ReadAll(m)
			return total, errors.New(string(reason))
		}

		n, err := io.Copy(io.Discard, m)
		if err != nil {
			return total, err
		}

		total += n
	}

	return total, nil
}

// checkSuccess reads the status at the end of a session.
func checkSuccess(r io.Reader) error {
	status, err := io.ReadAll(r)
	if err == nil && !strings.Contains(string(status), "Success") {
		err = errors.New(string(status))
	}
	return err
}

// openSPDY opens a session.
func (t *streamTarget) openSPDY(ctx context.Context, u *url.URL, protocol string) (httpstream.Connection, error) {
	conn, err := t.dial(ctx, "tcp", u.Host)
	if err != nil {
		return nil, err
	}

	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+
		"X-Stream-Protocol-Version: %s\r\n\r\n",
		u.RequestURI(), u.Host, protocol)
	resp, err := http.ReadResponse(bufio.NewReader(oneByteReader{conn}), nil)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}

	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, errors.Join(errors.New(resp.Status), conn.Close())
	}

	return spdy.NewClientConnection(conn)
}

// oneByteReader prevents a buffered reader from reading beyond the header of a response.
type oneByteReader struct{ io.Reader }

func (r oneByteReader) Read(p []byte) (int, error) { return r.Reader.Read(p[:1]) }

func (t *streamTarget) openWebSocket(ctx context.Context, u *url.URL, protocol string) (*websocket.Conn, error) {
	u.Scheme = "ws"
	d := websocket.Dialer{Subprotocols: []string{protocol}, NetDialContext: t.dial, ReadBufferSize: 64 << 10}
	c, _, err := d.DialContext(ctx, u.String(), nil)
	return c, err
}

// nextMessage returns the channel of the next message, and a reader of its data.
func nextMessage(c *websocket.Conn) (channel byte, m io.Reader, err error) {
	_, m, err = c.NextReader()
	if err != nil {
		return 0, nil, err
	}
	var number [1]byte
	_, err = io.ReadFull(m, number[:])
	return number[0], m, err
}
