// Command shop is the application of the cluster's tests: one static program with a role for each
// container. A shop has the roles front, catalog, prices, stock, orders and store. The other roles
// are web, a page that names its pod, and client, a loop of requests that counts failures.
//
//	shop ROLE [ARGUMENT...]
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	address        = ":8080"
	requestTimeout = 5 * time.Second // of requests between services
)

// roles has the handler of each role. Arguments are those after the role.
var roles = map[string]func(args []string) (http.Handler, error){
	"front":   func([]string) (http.Handler, error) { return front(), nil },
	"catalog": func([]string) (http.Handler, error) { return catalog(), nil },
	"prices":  func([]string) (http.Handler, error) { return prices(), nil },
	"stock":   func([]string) (http.Handler, error) { return stock(), nil },
	"orders":  func([]string) (http.Handler, error) { return orders(), nil },
	"store":   newStore,
	"web":     func([]string) (http.Handler, error) { return web(), nil },
	"client":  newClient,
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "shop:", err)
		os.Exit(1)
	}
}

// run runs the role of the first argument.
func run(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: shop ROLE [ARGUMENT...]")
	}

	role := args[0]
	switch role {
	case "check": // an exec probe
		_, err := call(http.MethodGet, "http://127.0.0.1"+address+"/healthz")
		return err

	case "lines":
		writeLines()
		return nil
	}

	newHandler, ok := roles[role]
	if !ok {
		return fmt.Errorf("unknown role %q", role)
	}

	handler, err := newHandler(args[1:])
	if err != nil {
		return err
	}

	return serve(role, handler)
}

// serve serves until SIGTERM, and then completes the requests in progress.
func serve(role string, handler http.Handler) error {
	mux := http.NewServeMux()
	mux.Handle("/", handler)
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	s := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: requestTimeout}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		defer cancel()
		done <- s.Shutdown(ctx)
	}()

	fmt.Println("serving", role)
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}

	return <-done
}

// writeLines prints numbered lines, a hundred each second, until SIGTERM.
func writeLines() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()

	for i := 1; ; i++ {
		fmt.Println("line", i)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// call sends a request to another service and returns its response.
func call(method, url string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	return callContext(ctx, method, url)
}

// fresh opens a connection for each request, so that a Service distributes the requests.
var fresh = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func callContext(ctx context.Context, method, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return "", err
	}

	resp, err := fresh.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()

	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, strings.TrimSpace(string(body)))
	}

	return string(body), err
}
