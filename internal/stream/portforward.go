package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

const (
	// maxUnpaired bounds the connections of a session with only one of their two streams open.
	maxUnpaired = 256
	// maxPorts bounds the ports of one WebSocket. Each port uses two channels, and channel numbers
	// have one byte.
	maxPorts = 64
	// podInterval is the interval of checks whether the pod of a session is running. A check opens
	// a file.
	podInterval = 2 * time.Second
	// lingerTimeout bounds the time for a client to close its side after the pod has.
	lingerTimeout = 30 * time.Second
)

// servePortForward serves connections to the ports of a pod until the client disconnects or the pod
// stops. A failed connection does not affect the others.
func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.PortForwardRequest) {
	go s.closeWithPod(c, q.PodSandboxId)
	if !wsstream.IsWebSocketRequest(r) {
		s.forwardSPDY(w, r, c, q.PodSandboxId)
		return
	}

	if len(q.Port) > maxPorts {
		http.Error(w, fmt.Sprintf("too many ports for one WebSocket: %d, the maximum is %d", len(q.Port), maxPorts),
			http.StatusBadRequest)
		return
	}

	s.forwardWebSocket(w, r, c, q)
}

// closeWithPod closes a session soon after its pod has stopped. It returns when the session ends.
// It requires two failed checks in succession, because one failure may be temporary.
func (s *Server) closeWithPod(c *conn, podID string) {
	check := time.NewTicker(s.podInterval)
	defer check.Stop()

	for failed := 0; failed < 2; {
		select {
		case <-check.C:
		case <-c.ctx.Done():
			return
		}

		netns, err := s.runtime.OpenNetNS(podID)
		netns.Close() // nil for the host's namespace and after an error; Close accepts nil
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			failed++
		} else {
			failed = 0
		}
	}

	s.log.Debug("closing port-forward session of a stopped pod", "sandbox", podID)
	c.Close()
}

// portForwardProtocols maps the subprotocols of port-forward to whether their frames are binary.
var portForwardProtocols = map[string]bool{
	"": true,
	"v4." + wsstream.ChannelWebSocketProtocol:       true,
	"v4." + wsstream.Base64ChannelWebSocketProtocol: false,
}

// forwardWebSocket serves a session with a data channel and an error channel for each port. Each
// channel starts with the port number in two bytes (little endian). The connections start
// immediately.
func (s *Server) forwardWebSocket(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.PortForwardRequest) {
	var kinds []wsstream.ChannelType
	for range q.Port {
		kinds = append(kinds, wsstream.ReadWriteChannel, wsstream.WriteChannel)
	}

	protocols := map[string]wsstream.ChannelProtocolConfig{}
	for name, isBinary := range portForwardProtocols {
		protocols[name] = wsstream.ChannelProtocolConfig{Binary: isBinary, Channels: kinds}
	}

	session := wsstream.NewConn(protocols)
	protocol, opened, err := session.Open(w, r)
	if err != nil {
		return
	}
	defer session.Close() //nolint:errcheck // the client is disconnected or has received all data

	var running sync.WaitGroup
	for i, port := range q.Port {
		data, failure := opened[2*i], opened[2*i+1]
		number := binary.LittleEndian.AppendUint16(nil, uint16(port))
		_, _ = data.Write(number)
		_, _ = failure.Write(number)
		var to io.Writer = data
		if portForwardProtocols[protocol] {
			to = webSocketData{data, c.frames, byte(2 * i)}
		}

		running.Go(func() {
			defer data.Close()
			defer failure.Close()
			if _, err := s.forward(c.ctx, q.PodSandboxId, port, data, to); err != nil {
				s.log.Debug("port-forward", "sandbox", q.PodSandboxId, "port", port, "err", err)
				fmt.Fprintf(failure, "error forwarding port %d to pod %s: %v", port, q.PodSandboxId, err)
			}
		})
	}

	running.Wait()
}

// forwardSPDY serves a session with two streams per connection, opened by the client.
func (s *Server) forwardSPDY(w http.ResponseWriter, r *http.Request, c *conn, podID string) {
	if _, err := httpstream.Handshake(r, w, portforward.SupportedProtocols); err != nil {
		return
	}

	p := &pairing{
		server:  s,
		conn:    c,
		ctx:     c.ctx,
		podID:   podID,
		session: newSessionRef(),
		open:    map[string]*pair{},
	}

	session := spdy.NewResponseUpgrader().UpgradeResponse(w, r, p.accept)
	p.session.set(session)
	if session == nil {
		return
	}

	select {
	case <-session.CloseChan():
	case <-c.ctx.Done():
	}

	c.Close() // ends the connections and pending writes
	p.close()
	_ = session.Close()
}

// pairing matches the streams of a session, two per connection.
type pairing struct {
	server  *Server
	conn    *conn           // of the client
	ctx     context.Context // ends with it
	podID   string
	session *sessionRef

	mu      sync.Mutex // guards the fields below
	open    map[string]*pair
	closed  bool
	failed  bool // a connection has failed
	running sync.WaitGroup
}

// pair are the two streams of one connection.
type pair struct {
	data, err httpstream.Stream
	sent      []<-chan struct{} // for each stream, closed after the session has accepted it
	late      *time.Timer
}

// accept handles a stream opened by the client (httpstream.NewStreamHandler).
func (p *pairing) accept(s httpstream.Stream, sent <-chan struct{}) error {
	if err := reply(s); err != nil {
		_ = s.Reset() // before the session handles the next frame of the stream
		return p.session.refuse(s, sent)
	}

	kind := s.Headers().Get(portforward.StreamType)
	port, err := strconv.ParseUint(s.Headers().Get(portforward.PortHeader), 10, 16)
	known := kind == portforward.StreamTypeError || kind == portforward.StreamTypeData
	if !known || err != nil || port == 0 || !p.add(s, kind, int32(port), sent) {
		return p.session.refuse(s, sent)
	}

	return nil
}

// add adds a stream to its connection, and starts the connection when both streams are open. It
// returns false for a second stream of the same type, and if too many connections are incomplete.
func (p *pairing) add(s httpstream.Stream, kind string, port int32, sent <-chan struct{}) bool {
	id := connectionID(s, kind)
	p.mu.Lock()
	defer p.mu.Unlock()

	half, known := p.open[id]
	switch {
	case p.closed, !known && len(p.open) >= maxUnpaired:
		return false
	case !known:
		half = &pair{}
		half.late = time.AfterFunc(p.server.streamTimeout, func() { p.expire(id, half) })
		half.add(s, kind, sent)
		p.open[id] = half
		return true

	case (kind == portforward.StreamTypeData) == (half.data != nil):
		return false
	}

	half.add(s, kind, sent)
	half.late.Stop()
	delete(p.open, id)
	p.running.Go(func() { p.run(half, port) })

	return true
}

func (h *pair) add(s httpstream.Stream, kind string, replySent <-chan struct{}) {
	h.sent = append(h.sent, replySent)
	if kind == portforward.StreamTypeData {
		h.data = s
	} else {
		h.err = s
	}
}

func (h *pair) streams() (all []httpstream.Stream) {
	for _, s := range []httpstream.Stream{h.data, h.err} {
		if s != nil {
			all = append(all, s)
		}
	}
	return all
}

// connectionID returns an ID of the connection of a stream. Clients before Kubernetes 1.6 send no
// request ID. Their data stream directly follows the error stream.
func connectionID(s httpstream.Stream, kind string) string {
	if id := s.Headers().Get(portforward.PortForwardRequestIDHeader); id != "" {
		return "request " + id
	}

	n := s.Identifier()
	if kind == portforward.StreamTypeData {
		n -= 2
	}

	return "stream " + strconv.FormatUint(uint64(n), 10)
}

// expire closes a connection without its second stream.
func (p *pairing) expire(id string, half *pair) {
	p.mu.Lock()
	if p.open[id] != half || p.closed {
		p.mu.Unlock()
		return
	}

	delete(p.open, id)
	p.running.Add(1)
	p.mu.Unlock()
	defer p.running.Done()

	if half.err != nil {
		fmt.Fprint(half.err, errNoStreams)
	}

	p.session.reset(half.streams(), half.sent...)
}

// run forwards one connection. It logs a failure and does not send it to the client: for any text
// on an error stream, clients end the whole session with all its connections (client-go,
// tools/portforward). The client only sees the end of the connection.
func (p *pairing) run(h *pair, port int32) {
	defer func() { p.session.reset(h.streams(), h.sent...) }()

	discarded, err := p.server.forward(p.ctx, p.podID, port, h.data,
		spdyData{h.data, p.conn.frames, h.data.Identifier()})
	var pod *podError
	switch {
	case errors.As(err, &pod): // all connections of the session would fail
		p.server.log.Debug("port-forward", "sandbox", p.podID, "port", port, "err", err)
		fmt.Fprintf(h.err, "error forwarding port %d to pod %s: %v", port, p.podID, err)
		return
	case err != nil:
		p.logFailure(port, err)
		return
	}

	_ = h.data.Close()
	_ = h.err.Close()
	late := time.NewTimer(lingerTimeout)
	defer late.Stop()

	select {
	case <-discarded:
	case <-late.C:
	case <-p.ctx.Done():
	}
}

// logFailure logs the failure of a connection: the first one of a session at info level, the others
// at debug level.
func (p *pairing) logFailure(port int32, err error) {
	p.mu.Lock()
	level := slog.LevelDebug
	if !p.failed {
		p.failed, level = true, slog.LevelInfo
	}

	p.mu.Unlock()
	p.server.log.Log(p.ctx, level, "forwarded connection failed; the session continues", "sandbox", p.podID,
		"port", port, "err", err)
}

// close refuses new streams and waits for the connections to end.
func (p *pairing) close() {
	p.mu.Lock()
	p.closed = true
	for id, half := range p.open {
		half.late.Stop()
		delete(p.open, id)
	}

	p.mu.Unlock()
	p.running.Wait()
}
