package engine

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/model"
)

// logCheckServer simulates an engine during ReachLogDriver.
type logCheckServer struct {
	img    pause.Image
	loaded atomic.Bool

	load    http.HandlerFunc // before a load succeeds
	create  http.HandlerFunc // responds with the result of a create
	ping    http.HandlerFunc
	removed atomic.Int32
}

func (s *logCheckServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	switch route := operation(r.Method, r.URL.Path); {
	case strings.HasSuffix(r.URL.Path, "/_ping"):
		w.Header().Set("Api-Version", "1.41")
		s.ping(w, r)
	case strings.HasSuffix(r.URL.Path, "/info"):
		fmt.Fprint(w, `{"ServerVersion":"20.10.24","OSType":"linux","Architecture":"x86_64"}`)
	case route == "POST /images/load":
		s.load(w, r)
		s.loaded.Store(true)
		fmt.Fprint(w, `{"stream":"Loaded image"}`)
	case route == "POST /containers/create":
		s.create(w, r)
	case route == "DELETE /containers/{id}":
		s.removed.Add(1)
		w.WriteHeader(http.StatusNoContent)
	case route == "GET /images/{id}/json" && s.loaded.Load():
		in := map[string]any{
			"Id":     "sha256:" + strings.Repeat("ab", 32),
			"RootFS": image.RootFS{Type: "layers", Layers: []string{s.img.DiffID}},
			"Config": map[string]any{"Entrypoint": s.img.Entrypoint},
		}
		_ = json.NewEncoder(w).Encode(in)
	default:
		http.Error(w, `{"message":"not found"}`, http.StatusNotFound)
	}
}

// answer returns a handler that responds after a delay, or when the client disconnects.
func answer(delay time.Duration, status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(delay):
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

// logCheckCase is an engine and the expected result of ReachLogDriver.
type logCheckCase struct {
	load, create, ping http.HandlerFunc
	usable             bool
	unavailable        bool   // the kind of the error
	message            string // part of the error
}

func logCheckCases() map[string]logCheckCase {
	const never = time.Minute
	created := answer(0, http.StatusCreated, `{"Id":"`+strings.Repeat("cd", 32)+`"}`)

	return map[string]logCheckCase{
		"usable": {create: created, usable: true},
		"slow load of the pause image": {
			load:   func(http.ResponseWriter, *http.Request) { time.Sleep(400 * time.Millisecond) },
			create: created,
			usable: true,
		},
		"hanging load of the pause image": {
			load:        func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			create:      created,
			unavailable: true,
			message:     "cannot check the log driver",
		},
		"no driver": {
			create:  answer(0, http.StatusBadRequest, `{"message":"logger: no log driver named 'x' is registered"}`),
			message: "no log driver named",
		},
		"full disk": {
			create:      answer(0, http.StatusInternalServerError, `{"message":"no space left on device"}`),
			unavailable: true,
			message:     "no space left on device",
		},
		"hanging driver": {
			create:  answer(never, http.StatusCreated, `{}`),
			message: "no response within 200ms",
		},
		"hanging engine": {
			create:      answer(never, http.StatusCreated, `{}`),
			ping:        answer(never, http.StatusOK, "OK"),
			unavailable: true,
			message:     "cannot check the log driver",
		},
	}
}

// TestReachLogDriver checks that only the engine's response about the driver, or a missing one,
// proves that the engine cannot use the driver. Slow or failed steps before prove nothing.
func TestReachLogDriver(t *testing.T) {
	nothing := func(http.ResponseWriter, *http.Request) {}
	img, err := pause.New("x86_64")
	if err != nil {
		t.Fatal(err)
	}

	for name, test := range logCheckCases() {
		t.Run(name, func(t *testing.T) {
			s := &logCheckServer{img: img, load: nothing, create: test.create, ping: nothing}
			if test.load != nil {
				s.load = test.load
			}

			e := engineOf(t, s)
			if _, err := e.Host(t.Context()); err != nil {
				t.Fatal(err)
			}
			if test.ping != nil {
				s.ping = test.ping
			}

			e.logCheck = logCheckTimeouts{
				prepare: 2 * time.Second,
				create:  200 * time.Millisecond,
				ping:    200 * time.Millisecond,
				remove:  time.Second,
			}
			err := e.ReachLogDriver(t.Context(), model.LogConfig{Driver: "x"})
			if test.usable {
				if err != nil || s.removed.Load() != 2 {
					t.Errorf("ReachLogDriver: %v, %d containers removed, want 2", err, s.removed.Load())
				}
				return
			}

			if err == nil || errdefs.IsUnavailable(err) != test.unavailable ||
				!strings.Contains(err.Error(), test.message) {
				t.Errorf("ReachLogDriver: %v, want %q, Unavailable: %v", err, test.message, test.unavailable)
			}
		})
	}
}
