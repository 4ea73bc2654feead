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

// Timeouts of requests without a closer deadline. The kubelet's own are two to four minutes.
const (
	readTimeout = 2 * time.Minute // of what changes nothing
	// of what does: the removal of a large container may take minutes
	changeTimeout = 10 * time.Minute
)

// Bounds of answers in bytes.
const (
	maxAnswer = 16 << 20 // of an answer that Docker's client decodes
	// of an answer that is read as a stream with bounded memory; a list repeats the labels of each
	// image
	maxHandedOver = 4 << 30
	// of an answer with an error; the message in it is text.MaxMessage at most
	maxErrorAnswer = 64 << 10
	maxHeader      = 256 << 10 // of an answer's header
)

// connection is one engine's client with its parts.
type connection struct {
	*client.Client                // whose answers are guarded
	streams        *client.Client // for connections that are taken over, of exec and attach
	transport      *http.Transport
}

// newConnection makes a client from options for its host and one for streams. Docker's client
// cannot have its own transport wrapped, so the guarded one gets another, which connects by dial
// or, if that is nil, as the first does, with TLS where that has it.
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

// Close ends idle connections.
func (c *connection) Close() error {
	c.transport.CloseIdleConnections()
	return c.streams.Close()
}

// guard bounds the time and the size of answers.
type guard struct{ base http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := r.Context(), context.CancelFunc(func() {})
	op := operation(r.Method, r.URL.Path)
	if limit := timeoutOf(op, r); limit > 0 {
		cause := fmt.Errorf("the engine has not answered %s within %s: %w", op, limit, context.DeadlineExceeded)
		ctx, cancel = context.WithTimeoutCause(ctx, limit, cause)
	}

	resp, err := g.base.RoundTrip(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, err
	}

	resp.Body = &closer{ReadCloser: resp.Body, cancel: cancel}
	a, _ := r.Context().Value(answerKey{}).(*answer)
	switch {
	case resp.StatusCode < http.StatusOK || resp.StatusCode >= http.StatusBadRequest:
		boundError(resp)
	case a != nil && !strings.HasSuffix(op, "/_ping"): // the client may ping first, to negotiate
		a.take(resp, op)
	case !isStream(op):
		resp.Body = limited{resp.Body, &io.LimitedReader{R: resp.Body, N: maxAnswer}}
	}

	return resp, nil
}

const (
	opEvents = "GET /events"
	opPull   = "POST /images/create"
	opLoad   = "POST /images/load"
)

// isStream says whether an answer has no bound: an event stream lives as long as the connection,
// and a pull ends when nothing moves.
func isStream(op string) bool { return op == opEvents || op == opPull || op == opLoad }

// timeoutOf is how long a request may take with its answer, 0 for streams.
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

// closer ends a request's timeout with its body.
type closer struct {
	io.ReadCloser
	cancel context.CancelFunc
}

// Close implements io.Closer.
func (c *closer) Close() error {
	defer c.cancel()
	return c.ReadCloser.Close()
}

// limited is a body that fails beyond its bound.
type limited struct {
	io.ReadCloser
	rest *io.LimitedReader
}

// Read implements io.Reader.
func (l limited) Read(p []byte) (int, error) {
	n, err := l.rest.Read(p)
	if err == io.EOF && l.rest.N <= 0 { //nolint:errorlint // io.Reader's contract
		return n, fmt.Errorf("answer of the engine: %w", tolerant.ErrTooLarge)
	}
	return n, err
}

// boundError replaces an answer with an error by one of bounded length in valid text. This is the
// gate for the engine's messages.
func boundError(resp *http.Response) {
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorAnswer)) // the beginning is better than nothing
	resp.Body.Close()                                               //nolint:errcheck,gosec // it has been read
	message := strings.TrimSpace(string(raw))
	if resp.Header.Get("Content-Type") == "application/json" {
		var said struct {
			Message string `json:"message"`
		}
		limits := tolerant.Limits{Text: maxErrorAnswer, Group: maxErrorAnswer, Total: maxErrorAnswer}
		if _, err := tolerant.Decode(bytes.NewReader(raw), &said, limits); err == nil {
			message = said.Message
		}
	}

	body, err := json.Marshal(map[string]string{"message": text.Clean(message, text.MaxMessage)})
	if err != nil {
		body = []byte("{}")
	}

	resp.Header.Set("Content-Type", "application/json")
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
}

// answer takes the body of an answer over from Docker's client, whose decoders refuse a whole
// answer for one field and read any length.
type answer struct{ body io.ReadCloser }

type answerKey struct{}

// take leaves to the client an answer of nothing: null, or a stream without an element.
func (a *answer) take(resp *http.Response, op string) {
	left := "null"
	if op == opEvents {
		a.body, left = resp.Body, ""
	} else {
		a.body = limited{resp.Body, &io.LimitedReader{R: resp.Body, N: maxHandedOver}}
	}
	resp.Body, resp.ContentLength = io.NopCloser(strings.NewReader(left)), int64(len(left))
}

// ask has call make one request of Docker's client and gives its answer to read, which may keep
// reading until it returns. call's errors are the engine's.
func ask(ctx context.Context, call func(context.Context) error, read func(io.Reader) error) error {
	var a answer
	err := call(context.WithValue(ctx, answerKey{}, &a))
	if a.body != nil {
		defer a.body.Close() //nolint:errcheck // it has been read
	}
	if err != nil {
		return err
	}

	if a.body == nil {
		return fmt.Errorf("the engine sent no answer: %w", io.ErrUnexpectedEOF)
	}
	if arrived, ok := ctx.Value(arrivedKey{}).(func()); ok {
		arrived()
	}

	return read(a.body)
}
