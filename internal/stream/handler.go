package stream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream/wsstream"

	"cri-dockerd/internal/engine"
)

// ServeHTTP serves one URL: GET or POST of /exec/TOKEN, /attach/TOKEN or /portforward/TOKEN.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, token, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		http.Error(w, "use GET or POST", http.StatusMethodNotAllowed)
		return
	}

	request, ok := s.tokens.take(token, time.Now())
	if !ok || kind != kindOf(request) {
		http.NotFound(w, r)
		return
	}

	c := r.Context().Value(connKey{}).(*conn)
	if err := c.Keep(); err != nil {
		s.log.Warn("rejected streaming session", "kind", kind, "err", err)
		message := fmt.Sprintf("%s: %v; close other exec, attach or port-forward sessions on this node", kind, err)
		http.Error(w, message, http.StatusServiceUnavailable)
		return
	}

	u := &upgrade{ResponseWriter: w, conn: c, spdy: !wsstream.IsWebSocketRequest(r)}
	defer func() {
		if u.hijacked {
			c.Close()
		}
	}()

	// Free the slot of a disconnected client immediately, even if its command continues.
	stop := context.AfterFunc(c.ctx, func() { c.Close() })
	defer stop()

	c.closeWhenIdle(s.idle)
	s.serve(u, r, c, request)
}

// kindOf returns the first path element in the URL of a request.
func kindOf(request any) string {
	switch request.(type) {
	case *runtimeapi.ExecRequest:
		return "exec"
	case *runtimeapi.AttachRequest:
		return "attach"
	}
	return "portforward"
}

// serve serves a session until its end.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, c *conn, request any) {
	switch q := request.(type) {
	case *runtimeapi.ExecRequest:
		s.serveExec(w, r, c, q)
	case *runtimeapi.AttachRequest:
		s.serveAttach(w, r, c, q)
	case *runtimeapi.PortForwardRequest:
		s.servePortForward(w, r, c, q)
	}
}

// serveExec runs a command. If the client disconnects, the process continues, as with other
// runtimes. A process with a terminal is hung up.
func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.ExecRequest) {
	ch, ok := s.openChannels(w, r, c, streamOptions{q.Stdin, q.Stdout, q.Stderr, q.Tty})
	if !ok {
		return
	}
	defer ch.close()

	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)

	stop := context.AfterFunc(c.ctx, func() { cancel(engine.ErrClientDisconnected) })
	defer stop()

	out := s.newOutputs(ctx, c, true)
	defer out.discard()

	code, err := s.runtime.Exec(ctx, q.ContainerId, engine.Exec{
		Cmd:     q.Cmd,
		Streams: ch.streams(ctx, out),
		OnExit:  out.commandExited,
	})
	if err = out.flush(err); err != nil {
		err = fmt.Errorf("error executing command in container: %w", err)
		s.log.Debug("exec", "container", q.ContainerId, "err", err)
	}

	ch.finish(code, err)
}

// serveAttach attaches to a container until its output ends or the client disconnects.
func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.AttachRequest) {
	ch, ok := s.openChannels(w, r, c, streamOptions{q.Stdin, q.Stdout, q.Stderr, q.Tty})
	if !ok {
		return
	}
	defer ch.close()

	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)

	stop := context.AfterFunc(c.ctx, func() { cancel(engine.ErrClientDisconnected) })
	defer stop()

	out := s.newOutputs(ctx, c, false)
	defer out.discard()

	err := s.runtime.Attach(ctx, q.ContainerId, ch.streams(ctx, out))
	if err = out.flush(err); c.ctx.Err() != nil {
		return // the client is disconnected
	}

	if err != nil {
		err = fmt.Errorf("error attaching to container: %w", err)
		s.log.Debug("attach", "container", q.ContainerId, "err", err)
	}

	ch.finish(0, err)
}

// upgrade is the response to an upgrade request.
type upgrade struct {
	http.ResponseWriter
	conn     *conn
	spdy     bool
	hijacked bool
}

// Hijack implements http.Hijacker. For SPDY it adds limits on the frames of the client.
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	h, ok := u.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, errors.New("connection cannot be upgraded")
	}

	nc, rw, err := h.Hijack()
	if err != nil {
		return nil, nil, err
	}

	u.hijacked = true
	frames := newFrameConn(nc)
	u.conn.frames = frames
	if u.spdy {
		rw = bufio.NewReadWriter(bufio.NewReader(&frameReader{r: rw.Reader, reject: u.conn.Close}), rw.Writer)
		return &frameWriter{frameConn: frames}, rw, nil
	}

	// The buffer holds one WebSocket message, so that it is written in one piece: a chunk, a header
	// of up to 10 bytes (RFC 6455, 5.2) and the channel number.
	return frames, bufio.NewReadWriter(rw.Reader, bufio.NewWriterSize(frames, chunkSize+11)), nil
}
