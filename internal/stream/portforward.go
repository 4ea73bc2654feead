package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

const (
	// maxUnpaired bounds the connections of a session of which the client has opened one stream and not the other.
	maxUnpaired = 256
	// maxPorts bounds the ports of one WebSocket, which has two channels of one byte for each.
	maxPorts = 64
	// lingerTimeout is how long the client may take to end its side after the pod has.
	lingerTimeout = 30 * time.Second
)

// servePortForward serves connections to the ports of a pod until the client goes away. A connection that fails does not end the others.
func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.PortForwardRequest) {
	if !wsstream.IsWebSocketRequest(r) {
		s.forwardSPDY(w, r, c, q.PodSandboxId)
		return
	}
	if len(q.Port) > maxPorts {
		http.Error(w, fmt.Sprintf("%d ports are too many for one WebSocket, give at most %d", len(q.Port), maxPorts), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, webSocketForwarder{s, c.ctx}, q.PodSandboxId, "", &portforward.V4Options{Ports: q.Port},
		0, streamTimeout, portforward.SupportedProtocols)
}

// webSocketForwarder forwards the channels of one WebSocket (portforward.PortForwarder).
type webSocketForwarder struct {
	server *Server
	client context.Context // ends with the connection
}

// PortForward implements portforward.PortForwarder, whose ctx does not end with the client.
func (f webSocketForwarder) PortForward(_ context.Context, podID, _ string, port int32, client io.ReadWriteCloser) error {
	_, err := f.server.forward(f.client, podID, port, client)
	return err
}

// forwardSPDY serves a session in which the client opens two streams per connection.
func (s *Server) forwardSPDY(w http.ResponseWriter, r *http.Request, c *conn, podID string) {
	if _, err := httpstream.Handshake(r, w, portforward.SupportedProtocols); err != nil {
		return
	}
	p := &pairing{
		server: s,
		ctx:    c.ctx,
		podID:  podID,
		open:   map[string]*pair{},
		ready:  make(chan struct{}),
	}
	session := spdy.NewResponseUpgrader().UpgradeResponse(w, r, p.accept)
	if session == nil {
		return
	}
	p.session = session
	close(p.ready)

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
	ctx     context.Context // ends with the client's connection
	podID   string
	session httpstream.Connection
	ready   chan struct{} // closed when session is set

	mu      sync.Mutex // guards the rest
	open    map[string]*pair
	closed  bool
	running sync.WaitGroup
}

// pair is the streams of one connection.
type pair struct {
	data, err httpstream.Stream
	sent      []<-chan struct{} // closed when the session knows each stream
	late      *time.Timer
}

// accept takes a stream that the client has opened (httpstream.NewStreamHandler).
func (p *pairing) accept(s httpstream.Stream, replySent <-chan struct{}) error {
	kind := s.Headers().Get(portforward.StreamType)
	if kind != portforward.StreamTypeError && kind != portforward.StreamTypeData {
		return fmt.Errorf("unexpected stream type %.40q", kind)
	}
	port, err := strconv.ParseUint(s.Headers().Get(portforward.PortHeader), 10, 16)
	if err != nil || port == 0 {
		return errors.New("the stream has no port between 1 and 65535")
	}
	if err := reply(s); err != nil {
		return err
	}
	id := connectionID(s, kind)

	p.mu.Lock()
	defer p.mu.Unlock()
	half, known := p.open[id]
	switch {
	case p.closed:
		return errors.New("the session ends")
	case !known && len(p.open) >= maxUnpaired:
		return fmt.Errorf("%d connections lack a stream, the limit", maxUnpaired)
	case known && (kind == portforward.StreamTypeData) == (half.data != nil):
		return fmt.Errorf("connection %.40q has a %s stream already", id, kind)
	}
	if !known {
		half = &pair{}
		half.late = time.AfterFunc(streamTimeout, func() { p.expire(id, half) })
		p.open[id] = half
	}
	half.add(s, kind, replySent)
	if known {
		half.late.Stop()
		delete(p.open, id)
		p.running.Go(func() { p.run(half, int32(port)) })
	}
	return nil
}

func (h *pair) add(s httpstream.Stream, kind string, replySent <-chan struct{}) {
	h.sent = append(h.sent, replySent)
	if kind == portforward.StreamTypeData {
		h.data = s
	} else {
		h.err = s
	}
}

// connectionID tells which connection a stream belongs to. Clients before Kubernetes 1.6 number their streams alone: the data stream
// comes next after the error stream.
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
	p.reset(half)
}

// run forwards one connection.
func (p *pairing) run(h *pair, port int32) {
	defer p.reset(h)
	discarded, err := p.server.forward(p.ctx, p.podID, port, h.data)
	if err != nil {
		p.server.log.Debug("port-forward", "sandbox", p.podID, "port", port, "err", err)
		fmt.Fprintf(h.err, "error forwarding port %d to pod %s: %v", port, p.podID, err)
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

// reset ends the streams of a connection, and the session forgets them.
func (p *pairing) reset(h *pair) {
	for _, sent := range h.sent {
		select {
		case <-sent:
		case <-p.ctx.Done():
		}
	}
	<-p.ready
	for _, s := range []httpstream.Stream{h.data, h.err} {
		if s != nil {
			_ = s.Reset()
			p.session.RemoveStreams(s)
		}
	}
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
