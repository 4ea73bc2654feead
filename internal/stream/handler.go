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
		s.log.Warn("refused a streaming session", "kind", kind, "err", err)
		http.Error(
			w,
			fmt.Sprintf("%s: %v; end other exec, attach or port-forward sessions on this node", kind, err),
			http.StatusServiceUnavailable,
		)
		return
	}

	u := &upgrade{ResponseWriter: w, conn: c, spdy: !wsstream.IsWebSocketRequest(r)}
	defer func() {
		if u.hijacked {
			c.Close()
		}
	}()

	// A client that is gone gives its place up at once, also while its command runs on.
	stop := context.AfterFunc(c.ctx, func() { c.Close() })
	defer stop()

	c.closeWhenSilent(s.idle)
	s.serve(u, r, c, request)
}

// kindOf is the first part of the URL of a request.
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

// serveExec runs a command. A client that goes away does not end the process, as on every other
// runtime, but a shell on a terminal is hung up.
func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.ExecRequest) {
	ch, ok := s.openChannels(w, r, c, wanted{q.Stdin, q.Stdout, q.Stderr, q.Tty})
	if !ok {
		return
	}
	defer ch.close()

	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)

	stop := context.AfterFunc(c.ctx, func() { cancel(engine.ErrClientGone) })
	defer stop()

	out := s.newOutputs(ctx, c, true)
	defer out.drop()

	code, err := s.runtime.Exec(ctx, q.ContainerId, engine.Exec{
		Cmd:     q.Cmd,
		Streams: ch.streams(ctx, out),
		Ended:   out.end,
	})
	if err = out.flush(err); err != nil {
		err = fmt.Errorf("error executing command in container: %w", err)
		s.log.Debug("exec", "container", q.ContainerId, "err", err)
	}

	ch.finish(code, err)
}

// serveAttach attaches to a container until its output ends or the client goes away.
func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request, c *conn, q *runtimeapi.AttachRequest) {
	ch, ok := s.openChannels(w, r, c, wanted{q.Stdin, q.Stdout, q.Stderr, q.Tty})
	if !ok {
		return
	}
	defer ch.close()

	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)

	stop := context.AfterFunc(c.ctx, func() { cancel(engine.ErrClientGone) })
	defer stop()

	out := s.newOutputs(ctx, c, false)
	defer out.drop()

	err := s.runtime.Attach(ctx, q.ContainerId, ch.streams(ctx, out))
	if err = out.flush(err); c.ctx.Err() != nil {
		return // nobody reads the result
	}

	if err != nil {
		err = fmt.Errorf("error attaching to container: %w", err)
		s.log.Debug("attach", "container", q.ContainerId, "err", err)
	}

	ch.finish(0, err)
}

// upgrade is a response whose connection becomes a session.
type upgrade struct {
	http.ResponseWriter
	conn     *conn
	spdy     bool
	hijacked bool
}

// Hijack hands out the connection, with limits on what the client may send over SPDY
// (http.Hijacker).
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	h, ok := u.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, errors.New("the connection cannot be upgraded")
	}

	nc, rw, err := h.Hijack()
	if err != nil {
		return nil, nil, err
	}

	u.hijacked = true
	frames := &frameConn{Conn: nc}
	u.conn.frames = frames
	if u.spdy {
		rw = bufio.NewReadWriter(bufio.NewReader(&frameReader{r: rw.Reader, refuse: u.conn.Close}), rw.Writer)
		return &frameWriter{frameConn: frames}, rw, nil
	}

	// A message of WebSocket is written at once: it is a chunk with a header of up to 10 bytes (RFC
	// 6455, 5.2) and the number of its channel.
	return frames, bufio.NewReadWriter(rw.Reader, bufio.NewWriterSize(frames, chunkSize+11)), nil
}
