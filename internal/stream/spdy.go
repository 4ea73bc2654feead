package stream

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// streamTimeout is how long a client of SPDY may take to open the streams of a session, or the second stream of a connection to a port.
const streamTimeout = 10 * time.Second

// reply accepts a stream. A stream whose reply has failed would block whoever writes to it, so that it must be refused.
func reply(s httpstream.Stream) error {
	if r, ok := s.(interface {
		SendReply(header http.Header, fin bool) error
	}); ok {
		return r.SendReply(http.Header{}, false)
	}
	return nil
}

// collector collects the streams of one exec or attach. Others are refused.
type collector struct {
	mu       sync.Mutex
	streams  map[string]httpstream.Stream
	want     int
	complete chan struct{} // closed when there are as many as wanted
}

// accept takes a stream that the client has opened (httpstream.NewStreamHandler).
func (c *collector) accept(s httpstream.Stream, _ <-chan struct{}) error {
	kind := s.Headers().Get(remotecommand.StreamType)
	switch kind {
	case remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout, remotecommand.StreamTypeStderr,
		remotecommand.StreamTypeError, remotecommand.StreamTypeResize:
	default:
		return fmt.Errorf("unexpected stream type %.40q", kind)
	}
	if err := reply(s); err != nil {
		return err
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.streams[kind]; taken || len(c.streams) >= c.want {
		return fmt.Errorf("unexpected second or additional stream of type %q", kind)
	}
	c.streams[kind] = s
	if len(c.streams) == c.want {
		close(c.complete)
	}
	return nil
}

// openSPDY upgrades to SPDY and waits for the client's streams.
func openSPDY(w http.ResponseWriter, r *http.Request, c *conn, want wanted) (*channels, bool) {
	protocol, err := httpstream.Handshake(r, w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return nil, false
	}
	v4 := protocol == remotecommand.StreamProtocolV4Name
	resizable := want.tty && (v4 || protocol == remotecommand.StreamProtocolV3Name)
	streams := &collector{
		streams:  map[string]httpstream.Stream{},
		want:     1, // for the status
		complete: make(chan struct{}),
	}
	for _, asked := range []bool{want.stdin, want.stdout, want.stderr, resizable} {
		if asked {
			streams.want++
		}
	}

	session := spdy.NewResponseUpgrader().UpgradeResponse(w, r, streams.accept)
	if session == nil {
		return nil, false
	}
	if err := streams.wait(r, session); err != nil {
		_ = c.SetWriteDeadline(time.Now().Add(finishTimeout))
		_ = session.Close()
		return nil, false
	}
	return streams.channels(session, v4), true
}

// wait waits until all streams are there, or will not come.
func (c *collector) wait(r *http.Request, session httpstream.Connection) error {
	late := time.NewTimer(streamTimeout)
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

func (c *collector) channels(session httpstream.Connection, v4 bool) *channels {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := &channels{json: v4, closer: session, status: io.Discard}
	if s, ok := c.streams[remotecommand.StreamTypeStdin]; ok {
		ch.in = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeStdout]; ok {
		ch.out = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeStderr]; ok {
		ch.err = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeResize]; ok {
		ch.sizes = s
	}
	if s, ok := c.streams[remotecommand.StreamTypeError]; ok {
		ch.status = s
	}
	return ch
}
