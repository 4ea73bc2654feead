package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"

	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/text"
)

// Timeouts of requests without an earlier deadline. The kubelet's timeouts are two to four minutes.
const (
	readTimeout = 2 * time.Minute // of read-only requests
	// changeTimeout applies to all other requests. The removal of a large container may take
	// minutes.
	changeTimeout = 10 * time.Minute
)

// Maximum sizes of responses in bytes.
const (
	maxDecoded = 16 << 20 // of a response decoded by Docker's client
	// maxStreamed applies to responses read as a stream with bounded memory. A list repeats the
	// image labels for each container.
	maxStreamed = 4 << 30
	// maxErrorBody applies to error responses. The message is at most text.MaxMessage long.
	maxErrorBody = 64 << 10
	maxHeader    = 256 << 10 // of the header of a response
)

// connection is a pair of clients for one engine.
type connection struct {
	*client.Client                // with bounded responses
	streams        *client.Client // for the hijacked connections of exec and attach
	transport      *http.Transport
}

// newConnection creates a bounded client and a client for streams from the options for the host.
// The transport of Docker's client cannot be wrapped, so the bounded client gets its own transport.
// This transport connects with dial or, if dial is nil, like the other client, including TLS.
func newConnection(
	dial func(context.Context) (net.Conn, error), host []client.Opt, common ...client.Opt,
) (*connection, error) {
	streams, err := client.New(append(append([]client.Opt{}, common...), host...)...)
	if err != nil {
		return nil, err
	}

	if dial == nil {
		dial = streams.Dialer()
	}

	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableCompression:     true,
		MaxIdleConns:           6,
		MaxResponseHeaderBytes: maxHeader,
		IdleConnTimeout:        30 * time.Second,
	}

	guarded := client.WithHTTPClient(&http.Client{Transport: guard{transport}, CheckRedirect: client.CheckRedirect})
	docker, err := client.New(append(append(append([]client.Opt{}, common...), host...), guarded)...)
	if err != nil {
		return nil, err
	}

	return &connection{Client: docker, streams: streams, transport: transport}, nil
}

// Close closes idle connections.
func (c *connection) Close() error {
	c.transport.CloseIdleConnections()
	return c.streams.Close()
}

// guard bounds the time and the size of responses.
type guard struct{ base http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := r.Context(), context.CancelFunc(func() {})
	op := operation(r.Method, r.URL.Path)
	if limit := timeoutOf(op, r); limit > 0 {
		cause := fmt.Errorf("engine did not respond to %s within %s: %w", op, limit, context.DeadlineExceeded)
		ctx, cancel = context.WithTimeoutCause(ctx, limit, cause)
	}

	req, err := bufferBody(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, fmt.Errorf("read the request's body: %w", err)
	}

	resp, err := g.base.RoundTrip(req)
	if err != nil {
		cancel()
		return nil, err
	}

	resp.Body = &cancelBody{ReadCloser: resp.Body, cancel: cancel}
	d, _ := r.Context().Value(divertKey{}).(*divertedBody)
	switch {
	case resp.StatusCode < http.StatusOK || resp.StatusCode >= http.StatusBadRequest:
		boundError(resp)
	case d != nil && !strings.HasSuffix(op, "/_ping"): // the client may ping first, to negotiate
		d.take(resp, op)
	case !isStream(op):
		resp.Body = limitedBody{resp.Body, &io.LimitedReader{R: resp.Body, N: maxDecoded}}
	}

	return resp, nil
}

// maxBufferedBody bounds a request's body to copy, in bytes. Bodies with JSON are smaller.
const maxBufferedBody = 64 << 10

// bufferBody copies a small body into memory, so that the transport sends it together with the
// header. Otherwise the body follows in a second write and wakes up the engine twice, because
// otelhttp wraps it (net/http sends the header first if it does not know the type of the body). r
// is a copy of the caller's request.
func bufferBody(r *http.Request) (*http.Request, error) {
	if r.ContentLength <= 0 || r.ContentLength > maxBufferedBody {
		return r, nil
	}
	defer r.Body.Close()

	body, err := io.ReadAll(io.LimitReader(r.Body, r.ContentLength+1))
	if err != nil {
		return nil, err
	}

	// The transport refuses a body whose size is not ContentLength.
	r.Body = io.NopCloser(bytes.NewReader(body))

	return r, nil
}

const (
	opEvents = "GET /events"
	opPull   = "POST /images/create"
	opLoad   = "POST /images/load"
)

// isStream reports whether a response is unbounded. An event stream lasts as long as the
// connection, and pulls have a progress deadline instead.
func isStream(op string) bool { return op == opEvents || op == opPull || op == opLoad }

// timeoutOf returns the timeout of a request including its response, 0 for streams.
func timeoutOf(op string, r *http.Request) time.Duration {
	switch {
	case isStream(op):
		return 0
	case op == "POST /containers/{id}/stop":
		grace, _ := strconv.Atoi(r.URL.Query().Get("t"))
		return time.Duration(max(grace, 0))*time.Second + changeTimeout
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		return readTimeout
	}

	return changeTimeout
}

// cancelBody is a response body. Closing it releases the timeout of the request.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

// Close implements io.Closer.
func (b *cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// limitedBody is a response body of limited size. Beyond the limit, Read returns ErrTooLarge.
type limitedBody struct {
	io.ReadCloser
	limited *io.LimitedReader
}

// Read implements io.Reader.
func (b limitedBody) Read(p []byte) (int, error) {
	n, err := b.limited.Read(p)
	if err == io.EOF && b.limited.N <= 0 { //nolint:errorlint // io.Reader's contract
		return n, fmt.Errorf("read the engine's response: %w", tolerant.ErrTooLarge)
	}
	return n, err
}

// boundError replaces an error response by one of valid UTF-8 and bounded length. All error
// messages of the engine pass through it.
func boundError(resp *http.Response) {
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // a partial message is better than none
	resp.Body.Close()                                             //nolint:errcheck,gosec // it has been read

	message := strings.TrimSpace(string(raw))
	if resp.Header.Get("Content-Type") == "application/json" {
		var decoded struct {
			Message string `json:"message"`
		}
		limits := tolerant.Limits{Text: maxErrorBody, Group: maxErrorBody, Total: maxErrorBody}
		if _, err := tolerant.Decode(bytes.NewReader(raw), &decoded, limits); err == nil {
			message = decoded.Message
		}
	}

	body, err := json.Marshal(map[string]string{"message": text.Clean(message, text.MaxMessage)})
	if err != nil {
		body = []byte("{}")
	}

	resp.Header.Set("Content-Type", "application/json")
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
}

// divertedBody is a response body diverted from Docker's client. The client's decoders reject a
// whole response for one bad field, and do not limit its size.
type divertedBody struct{ body io.ReadCloser }

type divertKey struct{}

// take takes the body of a response. In its place the client gets an empty one: null, or a stream
// without elements.
func (d *divertedBody) take(resp *http.Response, op string) {
	empty := "null"
	if op == opEvents {
		d.body, empty = resp.Body, ""
	} else {
		d.body = limitedBody{resp.Body, &io.LimitedReader{R: resp.Body, N: maxStreamed}}
	}
	resp.Body, resp.ContentLength = io.NopCloser(strings.NewReader(empty)), int64(len(empty))
}

// readResponse passes the body of a response to read. call must send one request with Docker's
// client; its error is the engine's.
func readResponse(ctx context.Context, call func(context.Context) error, read func(io.Reader) error) error {
	var d divertedBody
	err := call(context.WithValue(ctx, divertKey{}, &d))
	if d.body != nil {
		defer d.body.Close() //nolint:errcheck // it has been read
	}
	if err != nil {
		return err
	}

	if d.body == nil {
		return fmt.Errorf("engine sent no response body: %w", io.ErrUnexpectedEOF)
	}
	if arrived, ok := ctx.Value(arrivedKey{}).(func()); ok {
		arrived()
	}

	return read(d.body)
}
