package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// start returns a proxy in front of a test engine, and a client of the proxy. The engine sends the
// path of each request to served, and an event for each value from step.
func start(t *testing.T) (p *Proxy, client *http.Client, served chan string, step chan struct{}) {
	t.Helper()
	step = make(chan struct{}, 100)
	engine := filepath.Join(t.TempDir(), "engine.sock")
	l, err := net.Listen("unix", engine)
	if err != nil {
		t.Fatal(err)
	}

	served = make(chan string, 100)
	handler := func(w http.ResponseWriter, r *http.Request) {
		served <- r.URL.Path
		if r.URL.Path != "/events" {
			fmt.Fprint(w, "complete response")
			return
		}

		for i := range 4 {
			<-step // the proxy has read the previous event
			fmt.Fprintf(w, "event %d\n", i)
			_ = http.NewResponseController(w).Flush()
		}
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(handler)}

	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	p = Start(t, filepath.Join(t.TempDir(), "proxy.sock"), engine)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.Socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)

	return p, &http.Client{Transport: transport}, served, step
}

// post sends a POST request and returns the response or the error as text.
func post(ctx context.Context, c *http.Client, path string) string {
	return send(ctx, c, http.MethodPost, path, strings.NewReader("{}"))
}

func send(ctx context.Context, c *http.Client, method, path string, body io.Reader) string {
	r, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, body)
	if err != nil {
		return err.Error()
	}

	resp, err := c.Do(r)
	if err != nil {
		return "no response"
	}
	defer resp.Body.Close()

	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return string(b) + ", cut"
	}

	return fmt.Sprint(resp.StatusCode, " ", string(b))
}

func TestFaults(t *testing.T) {
	const broken = `500 {"message":"broken by the test"}`
	for name, c := range map[string]struct {
		fault  Fault
		want   string
		served int
	}{
		"none":        {want: "200 complete response", served: 1},
		"delay":       {fault: Fault{Delay: time.Millisecond}, want: "200 complete response", served: 1},
		"cut":         {fault: Fault{Cut: true}, want: "no response"},
		"cut after":   {fault: Fault{Cut: true, After: true}, want: "no response", served: 1},
		"error":       {fault: Fault{Status: 500}, want: broken},
		"error after": {fault: Fault{Status: 500, After: true}, want: broken, served: 1},
		"truncated":   {fault: Fault{Truncate: 8}, want: "complete, cut", served: 1},
		"hang":        {fault: Fault{Hang: true}, want: "no response"},
		"hang, late":  {fault: Fault{Hang: true, Late: true}, want: "no response", served: 1},
	} {
		t.Run(name, func(t *testing.T) {
			p, client, served, _ := start(t)
			p.Break(func(*http.Request) Fault { return c.fault })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()

			if c.fault.Hang {
				time.AfterFunc(50*time.Millisecond, cancel)
			}
			if got := post(ctx, client, "/containers/create"); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}

			p.Break(nil)
			for range c.served {
				<-served
			}

			if got := post(t.Context(), client, "/last"); got != "200 complete response" {
				t.Errorf("after the fault: got %q", got)
			}

			got := <-served
			if c.fault.Hang && got != "/last" { // the fault may end before the client
				got = <-served
			}
			if got != "/last" {
				t.Errorf("engine: got request for %s, want /last", got)
			}
		})
	}
}

func TestEvents(t *testing.T) {
	const all = "event 0\nevent 1\nevent 2\nevent 3\n"
	for name, c := range map[string]struct {
		fault Fault
		want  string // a pattern
	}{
		"none":      {want: "200 " + all},
		"silent":    {fault: Fault{Silent: true}, want: "200 "},
		"truncated": {fault: Fault{Truncate: 1}, want: "no response|, cut"},
		"reordered": {fault: Fault{Reorder: true}, want: "200 event 1\nevent 0\nevent 3\nevent 2\n"},
	} {
		t.Run(name, func(t *testing.T) {
			p, client, _, step := start(t)
			p.Break(func(*http.Request) Fault { // called for the request and for each event
				step <- struct{}{}
				return c.fault
			})

			got := send(t.Context(), client, http.MethodGet, "/events", http.NoBody)
			if !regexp.MustCompile("^(" + c.want + ")$").MatchString(got) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestObserve(t *testing.T) {
	p, client, served, _ := start(t)
	var observed []string
	p.Observe(
		func(r *http.Request) {
			observed = append(observed, fmt.Sprint("before ", r.URL.Path, " ", len(served)))
		},
		func(r *http.Request) { observed = append(observed, fmt.Sprint("after ", r.URL.Path, " ", len(served))) })
	post(t.Context(), client, "/start")
	post(t.Context(), client, "/_ping")
	if got := fmt.Sprint(observed); got != "[before /start 0 after /start 1]" {
		t.Errorf("got observations %s", got)
	}
}
