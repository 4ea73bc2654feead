package stream

import (
	"io"
	"net/http"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// defaultStreamTimeout bounds the time for a SPDY client to open all streams of a session, or the
// second stream of a forwarded connection.
const defaultStreamTimeout = 10 * time.Second

// reply accepts a stream. After a failed reply, writes to the stream would block, so the caller
// must refuse it.
func reply(s httpstream.Stream) error {
	if r, ok := s.(interface {
		SendReply(header http.Header, fin bool) error
	}); ok {
		return r.SendReply(http.Header{}, false)
	}
	return nil
}

// sessionRef is a reference to a session. It is set later, because streams may open before the
// upgrade returns the session.
type sessionRef struct {
	known chan struct{} // closed when conn is set
	conn  httpstream.Connection
}

func newSessionRef() *sessionRef { return &sessionRef{known: make(chan struct{})} }

func (r *sessionRef) set(conn httpstream.Connection) {
	r.conn = conn
	close(r.known)
}

// reset resets streams and removes them from the session. It first waits until the session has
// accepted each stream, signaled by its channel in sent.
func (r *sessionRef) reset(streams []httpstream.Stream, sent ...<-chan struct{}) {
	for _, c := range sent {
		<-c
	}

	<-r.known
	for _, s := range streams {
		_ = s.Reset()
	}

	if r.conn != nil {
		r.conn.RemoveStreams(streams...)
	}
}

// refuse resets an unexpected stream of a client. It returns no error, because the session would
// log a warning for each such stream.
func (r *sessionRef) refuse(s httpstream.Stream, sent <-chan struct{}) error {
	go r.reset([]httpstream.Stream{s}, sent)
	return nil
}

// collector collects the streams of one exec or attach, and refuses other streams.
type collector struct {
	session  *sessionRef
	want     int           // number of streams
	complete chan struct{} // closed when all streams are open

	mu      sync.Mutex // guards streams
	streams map[string]httpstream.Stream
}

// accept handles a stream opened by the client (httpstream.NewStreamHandler).
func (c *collector) accept(s httpstream.Stream, sent <-chan struct{}) error {
	if err := reply(s); err != nil {
		_ = s.Reset() // before the session handles the next frame of the stream
		return c.session.refuse(s, sent)
	}

	switch kind := s.Headers().Get(remotecommand.StreamType); kind {
	case remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout, remotecommand.StreamTypeStderr,
		remotecommand.StreamTypeError, remotecommand.StreamTypeResize:
		if !c.add(kind, s) {
			break
		}
		if kind != remotecommand.StreamTypeStdin && kind != remotecommand.StreamTypeResize {
			// Unread data would block the session, and it would not notice a disconnect of the
			// client.
			go func() { _, _ = io.Copy(io.Discard, s) }()
		}
		return nil
	}

	return c.session.refuse(s, sent)
}

// add adds a stream. It returns false for a second stream of a type, and for an excess stream.
func (c *collector) add(kind string, s httpstream.Stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()

	if _, taken := c.streams[kind]; taken || len(c.streams) >= c.want {
		return false
	}

	c.streams[kind] = s
	if len(c.streams) == c.want {
		close(c.complete)
	}

	return true
}

// openSPDY upgrades to SPDY and waits for the client's streams.
func (s *Server) openSPDY(w http.ResponseWriter, r *http.Request, c *conn, opts streamOptions) (*channels, bool) {
	protocol, err := httpstream.Handshake(r, w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return nil, false
	}

	v4 := protocol == remotecommand.StreamProtocolV4Name
	resizable := opts.tty && (v4 || protocol == remotecommand.StreamProtocolV3Name)
	streams := &collector{
		session:  newSessionRef(),
		streams:  map[string]httpstream.Stream{},
		want:     1, // for the status
		complete: make(chan struct{}),
	}

	for _, isRequested := range []bool{opts.stdin, opts.stdout, opts.stderr, resizable} {
		if isRequested {
			streams.want++
		}
	}

	session := spdy.NewResponseUpgrader().UpgradeResponse(w, r, streams.accept)
	streams.session.set(session)
	if session == nil {
		return nil, false
	}

	if err := streams.wait(r, session, s.streamTimeout); err != nil {
		_ = c.SetWriteDeadline(time.Now().Add(finishTimeout))
		_ = session.Close()
		return nil, false
	}

	return streams.channels(session, c.frames, v4), true
}

// wait waits until all streams are open. It returns an error if the timeout expires or the session
// ends first.
func (c *collector) wait(r *http.Request, session httpstream.Connection, timeout time.Duration) error {
	late := time.NewTimer(timeout)
	defer late.Stop()

	select {
	case <-c.complete:
		return nil
	case <-late.C:
		return errNoStreams
	case <-session.CloseChan():
		return io.EOF
	case <-r.Context().Done():
		return r.Context().Err()
	}
}

func (c *collector) channels(session httpstream.Connection, frames *frameConn, v4 bool) *channels {
	c.mu.Lock()
	defer c.mu.Unlock()

	ch := &channels{json: v4, closer: session, status: io.Discard}
	if s, ok := c.streams[remotecommand.StreamTypeStdin]; ok {
		ch.in = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeStdout]; ok {
		ch.out = spdyData{s, frames, s.Identifier()}
	}
	if s, ok := c.streams[remotecommand.StreamTypeStderr]; ok {
		ch.err = spdyData{s, frames, s.Identifier()}
	}
	if s, ok := c.streams[remotecommand.StreamTypeResize]; ok {
		ch.sizes = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeError]; ok {
		ch.status = s
	}

	return ch
}
