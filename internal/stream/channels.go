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

// streamOptions are the streams requested by an exec or attach.
type streamOptions struct{ stdin, stdout, stderr, tty bool }

// channels are the streams of one exec or attach.
type channels struct {
	streamOptions
	in       io.Reader
	out, err io.Writer
	sizes    io.Reader // terminal sizes in JSON; may be nil
	status   io.Writer
	json     bool // send the status as a metav1.Status instead of an error text
	conn     *conn
	closer   io.Closer // the session
}

// openChannels upgrades the connection. If it returns false, the client has received an error
// response.
func (s *Server) openChannels(
	w http.ResponseWriter, r *http.Request, c *conn, opts streamOptions,
) (ch *channels, ok bool) {
	if wsstream.IsWebSocketRequest(r) {
		ch, ok = openWebSocket(w, r, c, opts)
	} else {
		ch, ok = s.openSPDY(w, r, c, opts)
	}

	if ok {
		ch.streamOptions, ch.conn = opts, c
	}

	return ch, ok
}

// webSocketProtocols are the subprotocols of exec and attach by name. They differ in binary frames
// and in a JSON status.
var webSocketProtocols = map[string]struct{ binary, json bool }{
	"":                                      {binary: true},
	wsstream.ChannelWebSocketProtocol:       {binary: true},
	wsstream.Base64ChannelWebSocketProtocol: {},
	remotecommand.StreamProtocolV4Name:      {binary: true, json: true},
	"v4." + wsstream.Base64ChannelWebSocketProtocol: {json: true},
	remotecommand.StreamProtocolV5Name:              {binary: true, json: true},
}

// openWebSocket opens the five channels of a WebSocket.
func openWebSocket(w http.ResponseWriter, r *http.Request, c *conn, opts streamOptions) (*channels, bool) {
	direction := func(isRequested bool, kind wsstream.ChannelType) wsstream.ChannelType {
		if isRequested {
			return kind
		}
		return wsstream.IgnoreChannel
	}

	kinds := []wsstream.ChannelType{
		remotecommand.StreamStdIn:  direction(opts.stdin, wsstream.ReadChannel),
		remotecommand.StreamStdOut: direction(opts.stdout, wsstream.WriteChannel),
		remotecommand.StreamStdErr: direction(opts.stderr, wsstream.WriteChannel),
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

	ch.greet(opts)
	if webSocketProtocols[protocol].binary {
		ch.out = webSocketData{ch.out, c.frames, remotecommand.StreamStdOut}
		ch.err = webSocketData{ch.err, c.frames, remotecommand.StreamStdErr}
	}

	return ch, true
}

// greet sends an empty message on the first output. WebSocket clients take it as the start of the
// session.
func (ch *channels) greet(opts streamOptions) {
	first := ch.status
	switch {
	case opts.stdout:
		first = ch.out
	case opts.stderr:
		first = ch.err
	}

	_, _ = first.Write(nil)
}

// streams returns the streams for the engine. Their outputs are buffered by out. The goroutine for
// terminal sizes ends with ctx or with the session.
func (ch *channels) streams(ctx context.Context, out *outputs) engine.Streams {
	s := engine.Streams{TTY: ch.tty}
	// A channel not requested is at its end, and would close the stdin of the process.
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

// readSizes decodes terminal sizes until ctx ends or a size is malformed. It then discards the
// remaining input, because unread data would block the other streams of the session.
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

// status is a metav1.Status with the result of an exec or attach.
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

// finish sends the result: the exit code of the process, or an error.
func (ch *channels) finish(exitCode int, err error) {
	if !errors.Is(err, errClientTooSlow) { // then flush has set a deadline
		ch.limitWrites()
	}

	result := status{Status: "Success"}
	switch {
	case err != nil:
		result = status{
			Status:  "Failure",
			Reason:  "InternalError",
			Message: fmt.Sprintf("Internal error occurred: %v", err),
			Code:    http.StatusInternalServerError,
		}

	case exitCode != 0:
		code := strconv.Itoa(exitCode)
		result = status{
			Status:  "Failure",
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: "command terminated with non-zero exit code: exit status " + code,
			Details: &statusDetails{[]statusCause{{remotecommand.ExitCodeCauseType, code}}},
		}
	}

	text := []byte(result.Message)
	if ch.json {
		text, _ = json.Marshal(result) // cannot fail
	}
	if len(text) > 0 {
		_, _ = ch.status.Write(text)
	}
}

// limitWrites sets a deadline for the remaining writes, so that a client cannot keep the session
// open by not reading.
func (ch *channels) limitWrites() { _ = ch.conn.SetWriteDeadline(time.Now().Add(finishTimeout)) }

func (ch *channels) close() {
	ch.limitWrites()
	_ = ch.closer.Close()
}

var errNoStreams = errors.New("client did not open its streams in time")
