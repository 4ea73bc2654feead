package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Client is a client of the log-driver process.
type Client struct{ http *http.Client }

// NewClient returns a client of the process behind a socket. Each call opens a connection.
func NewClient(socket string) *Client {
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true, // calls are rare
	}}}
}

// statusTimeout limits the wait for the process's status.
const statusTimeout = 5 * time.Second

// Watch connects and returns the process's status. It calls changed, if not nil, with each later
// status. A process of an older release sends none. ended is closed when the process or ctx ends.
// Errors are Unavailable if no process responds.
func (c *Client) Watch(ctx context.Context, changed func(Status)) (s Status, ended <-chan struct{}, err error) {
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(statusTimeout, cancel)
	defer func() {
		late.Stop()
		if err != nil {
			cancel()
			err = fmt.Errorf("log-driver process: %w: %w", err, errdefs.ErrUnavailable)
		}
	}()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://log-driver"+watchPath, nil)
	if err != nil {
		return s, nil, err
	}

	resp, err := c.http.Do(req) //nolint:bodyclose // end closes it
	if err != nil {
		return s, nil, err
	}

	if resp.StatusCode != http.StatusOK {
		return s, nil, errors.Join(fmt.Errorf("unexpected status %s", resp.Status), resp.Body.Close())
	}

	dec := json.NewDecoder(resp.Body)
	if err := dec.Decode(&s); err != nil {
		return s, nil, errors.Join(err, resp.Body.Close())
	}

	end := make(chan struct{})
	go func() {
		defer close(end)
		defer cancel()

		for { // ends with the process or ctx
			var s Status
			if dec.Decode(&s) != nil {
				break
			}
			if changed != nil {
				changed(s)
			}
		}

		resp.Body.Close()
	}()

	return s, end, nil
}

// Metrics returns the process's metrics in Prometheus' data model. Errors are Unavailable if no
// process responds.
func (c *Client) Metrics(ctx context.Context) (map[string]*dto.MetricFamily, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://log-driver"+metricsPath, nil)
	if err != nil {
		return nil, err
	}

	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("log-driver process: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()

	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("log-driver process: metrics: unexpected status %s", resp.Status)
	}

	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.LimitReader(resp.Body, maxRequest))
	if err != nil {
		return nil, fmt.Errorf("log-driver process: metrics: %w", err)
	}

	return families, nil
}

// Reopen opens a new log at a container's path. It returns NotFound for a container without a
// stream, and Unavailable if no process responds.
func (c *Client) Reopen(ctx context.Context, container string) error {
	body, err := json.Marshal(reopenRequest{Container: container})
	if err != nil {
		return err
	}

	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://log-driver"+reopenPath, bytes.NewReader(body))
	if err != nil {
		return err
	}

	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("log-driver process: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()

	if resp.StatusCode == http.StatusOK {
		return nil
	}

	text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	err = errors.Join(fmt.Errorf("log-driver process: %s", strings.TrimSpace(string(text))), err)
	if resp.StatusCode == http.StatusNotFound {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}

	return err
}
