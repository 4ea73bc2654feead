package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// respond returns the status and the body of a response.
func respond(t *testing.T, h http.Handler, method, target string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, target, nil))
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}

	return w.Code, string(body)
}

// TestStoreKeepsCounters reopens the database after orders.
func TestStoreKeepsCounters(t *testing.T) {
	dir := t.TempDir()
	for _, want := range []string{"0", "2", "4"} {
		s, err := newStore([]string{dir})
		if err != nil {
			t.Fatal(err)
		}
		if code, got := respond(t, s, http.MethodGet, "/tea"); code != http.StatusOK || got != want {
			t.Errorf("tea: got %d %q, want %q", code, got, want)
		}

		for range 2 {
			if code, got := respond(t, s, http.MethodPost, "/tea"); code != http.StatusOK {
				t.Errorf("order: got %d %q", code, got)
			}
		}
	}

	if _, err := newStore([]string{dir + "/missing\x00"}); err == nil {
		t.Error("a directory that cannot be read: got no error")
	}
}

// TestPrices returns the price of a product and an error for others.
func TestPrices(t *testing.T) {
	if code, got := respond(t, prices(), http.MethodGet, "/?product=tea"); code != http.StatusOK || got != "4" {
		t.Errorf("tea: got %d %q", code, got)
	}
	if code, got := respond(t, prices(), http.MethodGet, "/?product=gold"); code != http.StatusBadGateway {
		t.Errorf("gold: got %d %q, want an error", code, got)
	}
}

// TestClientCounts counts failures and the longest outage of a target.
func TestClientCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &client{targets: map[string]*counts{"a": {}}}
		refused := errors.New("connection refused")
		for _, err := range []error{nil, refused, nil, refused, refused, refused, nil, refused} {
			c.count("a", time.Now(), err)
			time.Sleep(time.Second)
		}

		_, body := respond(t, service(c.respond), http.MethodPost, "/")
		var got map[string]counts
		if err := json.NewDecoder(strings.NewReader(body)).Decode(&got); err != nil {
			t.Fatal(err)
		}

		want := counts{Requests: 8, Failures: 5, Outage: 3 * time.Second, Error: "connection refused", Failing: true}
		if got["a"] != want {
			t.Errorf("got %+v, want %+v", got["a"], want)
		}
		if *c.targets["a"] != (counts{}) {
			t.Errorf("after a POST: got %+v, want zero counts", *c.targets["a"])
		}
	})
}
