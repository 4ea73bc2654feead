package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"

	"cri-dockerd/internal/engine"
)

// wanted is what an exec or attach asks for.
type wanted struct{ stdin, stdout, stderr, tty bool }

// channels are the streams of one exec or attach.
type channels struct {
	wanted
	in       io.Reader
	out, err io.Writer
	sizes    io.Reader // JSON of terminal sizes, nil for none
	status   io.Writer
	// json says that the status is a metav1.Status, else it is the text of an error.
	json   bool
	conn   *conn
	closer io.Closer // the session
}

// openChannels upgrades the connection. Without ok the client has got an answer.
func (s *Server) openChannels(w http.ResponseWriter, r *http.Request, c *conn, want wanted) (ch *channels, ok bool) {
	if wsstream.IsWebSocketRequest(r) {
		ch, ok = openWebSocket(w, r, c, want)
	} else {
		ch, ok = s.openSPDY(w, r, c, want)
	}

	if ok {
		ch.wanted, ch.conn = want, c
	}

	return ch, ok
}

// webSocketProtocols are the names of the subprotocols of exec and attach: whether frames are
// binary, and the status JSON.
var webSocketProtocols = map[string]struct{ binary, json bool }{
	"":                                      {binary: true},
	wsstream.ChannelWebSocketProtocol:       {binary: true},
	wsstream.Base64ChannelWebSocketProtocol: {},
	remotecommand.StreamProtocolV4Name:      {binary: true, json: true},
	"v4." + wsstream.Base64ChannelWebSocketProtocol: {json: true},
	remotecommand.StreamProtocolV5Name:              {binary: true, json: true},
}

// openWebSocket opens the five channels of a WebSocket.
func openWebSocket(w http.ResponseWriter, r *http.Request, c *conn, want wanted) (*channels, bool) {
	direction := func(asked bool, kind wsstream.ChannelType) wsstream.ChannelType {
		if asked {
			return kind
		}
		return wsstream.IgnoreChannel
	}

	kinds := []wsstream.ChannelType{
		remotecommand.StreamStdIn:  direction(want.stdin, wsstream.ReadChannel),
		remotecommand.StreamStdOut: direction(want.stdout, wsstream.WriteChannel),
		remotecommand.StreamStdErr: direction(want.stderr, wsstream.WriteChannel),
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: wsstream.ReadChannel,
	}

	protocols := map[string]wsstream.ChannelProtocolConfig{}
	for name, p := range webSocketProtocols {
		protocols[name] = wsstream.ChannelProtocolConfig{Binary: p.binary, Channels: kinds}
	}

	session := wsstream.NewConn(protocols)
	protocol, opened, err := session.Open(w, r)
	if err != nil {
		return nil, false
	}

	ch := &channels{
		in:     opened[remotecommand.StreamStdIn],
		out:    opened[remotecommand.StreamStdOut],
		err:    opened[remotecommand.StreamStdErr],
		sizes:  opened[remotecommand.StreamResize],
		status: opened[remotecommand.StreamErr],
		json:   webSocketProtocols[protocol].json,
		closer: session,
	}

	ch.greet(want)
	if webSocketProtocols[protocol].binary {
		ch.out = webSocketData{ch.out, c.frames, remotecommand.StreamStdOut}
		ch.err = webSocketData{ch.err, c.frames, remotecommand.StreamStdErr}
	}

	return ch, true
}

// greet sends an empty message on the first output: clients of WebSockets take it for the begin of
// the session.
func (ch *channels) greet(want wanted) {
	first := ch.status
	switch {
	case want.stdout:
		first = ch.out
	case want.stderr:
		first = ch.err
	}

	_, _ = first.Write(nil)
}

// streams are the channels as the engine takes them, with their outputs added to out. Reading
// terminal sizes ends with ctx or the session.
func (ch *channels) streams(ctx context.Context, out *outputs) engine.Streams {
	s := engine.Streams{TTY: ch.tty}
	// a channel that was not asked for would end at once, and close the stdin of the process
	if ch.stdin && ch.in != nil {
		s.Stdin = ch.in
	}
	if ch.stdout && ch.out != nil {
		s.Stdout = out.add(ch.out)
	}
	if ch.stderr && ch.err != nil && !ch.tty {
		s.Stderr = out.add(ch.err)
	}

	if ch.sizes != nil {
		sizes := make(chan engine.Size)
		go readSizes(ctx, ch.sizes, sizes)
		s.Resize = sizes
	}

	return s
}

// maxSize bounds the JSON of one terminal size in bytes.
const maxSize = 1024

// readSizes decodes terminal sizes until ctx ends. Then, and after a size that cannot be decoded,
// it discards what arrives: unread data would block the other streams of the session.
func readSizes(ctx context.Context, r io.Reader, sizes chan<- engine.Size) {
	bounded := &io.LimitedReader{R: r}
	decoder := json.NewDecoder(bounded)
	for {
		bounded.N = maxSize
		var size remotecommand.TerminalSize
		if decoder.Decode(&size) != nil {
			break
		}

		select {
		case sizes <- engine.Size{Width: size.Width, Height: size.Height}:
			continue
		case <-ctx.Done():
		}

		break
	}

	_, _ = io.Copy(io.Discard, r)
}

// status is the metav1.Status that ends an exec or attach.
type status struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *statusDetails `json:"details,omitempty"`
	Code    int32          `json:"code,omitempty"`
}

type statusDetails struct {
	Causes []statusCause `json:"causes,omitempty"`
}

type statusCause struct {
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// finish sends how the process ended: its exit code, or the error that kept it from running.
func (ch *channels) finish(exitCode int, err error) {
	if !errors.Is(err, errBehind) { // whose writes are limited already
		ch.limitWrites()
	}

	end := status{Status: "Success"}
	switch {
	case err != nil:
		end = status{
			Status:  "Failure",
			Reason:  "InternalError",
			Message: fmt.Sprintf("Internal error occurred: %v", err),
			Code:    http.StatusInternalServerError,
		}

	case exitCode != 0:
		code := strconv.Itoa(exitCode)
		end = status{
			Status:  "Failure",
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: "command terminated with non-zero exit code: exit status " + code,
			Details: &statusDetails{[]statusCause{{remotecommand.ExitCodeCauseType, code}}},
		}
	}

	text := []byte(end.Message)
	if ch.json {
		text, _ = json.Marshal(end) // cannot fail
	}
	if len(text) > 0 {
		_, _ = ch.status.Write(text)
	}
}

// limitWrites bounds the writes that are left, so that a client that does not read cannot hold the
// session.
func (ch *channels) limitWrites() { _ = ch.conn.SetWriteDeadline(time.Now().Add(finishTimeout)) }

func (ch *channels) close() {
	ch.limitWrites()
	_ = ch.closer.Close()
}

var errNoStreams = errors.New("the client did not open its streams in time")
