package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	clientInterval = 50 * time.Millisecond // between requests to a target
	clientTimeout  = time.Second           // of a request
)

// counts are the results of the requests to a target.
type counts struct {
	Requests int
	Failures int
	Outage   time.Duration // longest time from the first failure to the next success
	Error    string        // of the last failure
	Failing  bool          // no request has succeeded since the last failure

	since time.Time // of the first failure since the last success
}

// client sends requests to its targets all the time and returns the counts by name of the target. A
// POST request returns the counts and sets them to zero.
type client struct {
	mu      sync.Mutex
	targets map[string]*counts
}

// newClient starts the requests to the targets, each in the form NAME=URL.
func newClient(args []string) (http.Handler, error) {
	c := &client{targets: map[string]*counts{}}
	for _, a := range args {
		name, url, ok := strings.Cut(a, "=")
		if !ok {
			return nil, errors.New("usage: shop client NAME=URL [NAME=URL]")
		}

		c.targets[name] = &counts{}
		go c.loop(name, url)
	}

	return service(c.respond), nil
}

// loop starts a request at each interval. A slow response does not delay the next request.
func (c *client) loop(name, url string) {
	for range time.Tick(clientInterval) {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
			defer cancel()

			start := time.Now()
			_, err := callContext(ctx, http.MethodGet, url)
			c.count(name, start, err)
		}()
	}
}

func (c *client) count(name string, start time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()

	t := c.targets[name]
	t.Requests++
	switch {
	case err != nil:
		t.Failures++
		t.Error = err.Error()
		if !t.Failing {
			t.Failing, t.since = true, start
		}

	case t.Failing && start.After(t.since):
		t.Outage = max(t.Outage, start.Sub(t.since))
		t.Failing = false
	}
}

func (c *client) respond(r *http.Request) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()

	b, err := json.Marshal(c.targets)
	if r.Method == http.MethodPost {
		for _, t := range c.targets {
			*t = counts{}
		}
	}

	return string(b), err
}
