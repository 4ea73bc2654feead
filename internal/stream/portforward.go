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
	// maxUnpaired bounds the connections of a session of which the client has opened one stream and
	// not the other.
	maxUnpaired = 256
	// maxPorts bounds the ports of one WebSocket, which has two channels of one byte for each.
	maxPorts = 64
	// podInterval is how often the pod of a session is checked. That costs the opening of a file.
	podInterval = 2 * time.Second
	// lingerTimeout is how long the client may take to end its side after the pod has.
	lingerTimeout = 30 * time.Second
)

// servePortForward serves connections to the ports of a pod until the client goes away or the pod
// ends. A connection that fails does not end the others.
func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.PortForwardRequest) {
	go s.closeWithPod(c, q.PodSandboxId)
	if !wsstream.IsWebSocketRequest(r) {
		s.forwardSPDY(w, r, c, q.PodSandboxId)
		return
	}

	if len(q.Port) > maxPorts {
		http.Error(w, fmt.Sprintf("%d ports are too many for one WebSocket, give at most %d", len(q.Port), maxPorts),
			http.StatusBadRequest)
		return
	}

	s.forwardWebSocket(w, r, c, q)
}

// closeWithPod closes a session soon after its pod has ended, and returns when the session has. One
// failure may be that of a moment.
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
		netns.Close() // nil for the host's and with an error, which Close permits
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			failed++
		} else {
			failed = 0
		}
	}

	s.log.Debug("a port-forward ends with its pod", "sandbox", podID)
	c.Close()
}

// portForwardProtocols are the names of the subprotocols of port-forward: whether frames are
// binary.
var portForwardProtocols = map[string]bool{
	"": true,
	"v4." + wsstream.ChannelWebSocketProtocol:       true,
	"v4." + wsstream.Base64ChannelWebSocketProtocol: false,
}

// forwardWebSocket serves a session with two channels for each port, of data and of errors. Each
// begins with the number of the port in two bytes, the lower one first. Its connections begin at
// once.
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
	defer session.Close() //nolint:errcheck // the client is gone, or has everything

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

// forwardSPDY serves a session in which the client opens two streams per connection.
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

	c.Close() // ends the connections, and the writes under way
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

	mu      sync.Mutex // guards the rest
	open    map[string]*pair
	closed  bool
	failed  bool // a connection has
	running sync.WaitGroup
}

// pair is the streams of one connection.
type pair struct {
	data, err httpstream.Stream
	sent      []<-chan struct{} // closed when the session knows each stream
	late      *time.Timer
}

// accept takes a stream that the client has opened (httpstream.NewStreamHandler).
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

// add gives a stream to its connection, which begins when it has both. It returns false for a
// second stream of a type, and when too many connections lack a stream.
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

// connectionID tells which connection a stream belongs to. Clients before Kubernetes 1.6 number
// their streams alone: the data stream comes next after the error stream.
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

// expire gives up a connection whose second stream has not come.
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

// run forwards one connection. Its failure is logged and not sent: clients end the whole session,
// with all its connections, for any text on an error stream (client-go, tools/portforward). They
// see that the connection ends.
func (p *pairing) run(h *pair, port int32) {
	defer func() { p.session.reset(h.streams(), h.sent...) }()

	discarded, err := p.server.forward(p.ctx, p.podID, port, h.data,
		spdyData{h.data, p.conn.frames, h.data.Identifier()})
	var pod *podError
	switch {
	case errors.As(err, &pod): // no connection of the session can succeed
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

// logFailure logs why a connection failed, for the first one of a session so that it is noticed.
func (p *pairing) logFailure(port int32, err error) {
	p.mu.Lock()
	level := slog.LevelDebug
	if !p.failed {
		p.failed, level = true, slog.LevelInfo
	}

	p.mu.Unlock()
	p.server.log.Log(p.ctx, level, "a forwarded connection failed; the others of the session go on", "sandbox", p.podID,
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
