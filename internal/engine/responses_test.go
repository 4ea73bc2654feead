package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
	"cri-dockerd/internal/translate"
)

var (
	idA = strings.Repeat("a", 64)
	idB = strings.Repeat("b", 64)
)

// hostileConfigs are malformed image configurations. Docker copies them into the inspect response
// of a container.
var hostileConfigs = map[string]string{
	"port out of range":   `"ExposedPorts":{"99999/foo":{},"":{},"80/tcp/udp":{}}`,
	"published port":      `"ExposedPorts":[1,2]`,
	"environment":         `"Env":[1,{"a":"b"},null,["c"]]`,
	"environment, object": `"Env":{"a":"b"}`,
	"volumes":             `"Volumes":{"/a":7,"":"x","\u0000":null}`,
	"volumes, list":       `"Volumes":["/a"]`,
	"health check": `"Healthcheck":{"Test":"CMD","Interval":1e400,"Timeout":-9223372036854775809,` +
		`"Retries":"many"}`,
	"command":           `"Cmd":{"a":1},"Entrypoint":7`,
	"user":              `"User":["root"],"WorkingDir":3,"StopSignal":{"x":[]}`,
	"stop timeout":      `"StopTimeout":99999999999999999999`,
	"many labels":       `"More":{` + strings.TrimSuffix(strings.Repeat(`"k":"v",`, 1<<20), ",") + `}`,
	"one large label":   `"X":"` + strings.Repeat("a", 17<<20) + `"`,
	"large environment": `"Env":[` + strings.TrimSuffix(strings.Repeat(`"A=b",`, 1<<20), ",") + `]`,
}

// inspectOf returns the inspect response of a sandbox with an image configuration.
func inspectOf(id, name, config string) string {
	return `{"Id":"` + id + `","Name":"/k8s_POD_` + name + `_ns_u_0","State":{"Status":"running","Running":true},` +
		`"NetworkSettings":{"Ports":{"0/x":null},"Networks":{"n":{"IPAddress":"none","MacAddress":"zz"}}},` +
		`"Config":{"Labels":{"io.kubernetes.docker.type":"podsandbox","big":"` + strings.Repeat("l", 3<<20) + `"},` +
		config + `}}`
}

// TestHostileImages checks that a malformed image configuration hides neither its own container nor
// the others.
func TestHostileImages(t *testing.T) {
	for name, config := range hostileConfigs {
		t.Run(name, func(t *testing.T) {
			e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.41")
				switch p := r.URL.Path; {
				case strings.HasSuffix(p, "/containers/json"):
					fmt.Fprintf(w, `[{"Id":"%s","Names":["/a"],"Ports":[{"PrivatePort":99999,"IP":"x"}],`+
						`"Labels":{%s}},{"Id":"../../info"},7,{"Id":"%s"}]`, idA,
						`"l":"`+strings.Repeat("l", 1<<20)+`"`, idB)

				case strings.HasSuffix(p, idA+"/json"):
					io.WriteString(w, inspectOf(idA, "odd", config)) //nolint:errcheck // the client reads it
				case strings.HasSuffix(p, idB+"/json"):
					io.WriteString(w, inspectOf(idB, "good", `"Image":"app"`)) //nolint:errcheck // the client reads it
				}
			}))

			// The race detector slows down decoding, and this test is not about time.
			e.inspectTimeout = 5 * time.Minute
			objects, err := e.Objects(t.Context())
			if err != nil || len(objects) != 2 {
				t.Fatalf("%d objects, %v", len(objects), err)
			}

			for i, want := range []string{"odd", "good"} {
				s := objects[i].Sandbox
				if s == nil || s.Metadata.Name != want || !s.Running || len(s.Labels) > 1 {
					t.Errorf("object %d: %+v", i, s)
				}
			}
		})
	}
}

// TestResponsesAreBounded checks endless, truncated and empty responses.
func TestResponsesAreBounded(t *testing.T) {
	endless := func(w http.ResponseWriter, begin, repeat string) {
		part := []byte(strings.Repeat(repeat, 4096))
		_, err := io.WriteString(w, begin)
		for n := 0; err == nil && n < 256<<20; n += len(part) {
			_, err = w.Write(part)
		}
	}

	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/create"):
			w.WriteHeader(http.StatusCreated)
			endless(w, `{"Id":"`, "a")
		case strings.HasSuffix(p, "/containers/json"):
			endless(w, `[`, `{"Id":"`+idA+`"},`)
		case strings.HasSuffix(p, "/start"):
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusInternalServerError)
			endless(w, `{"message":"`, "no\xff ")

		case strings.HasSuffix(p, "/stop"):
			http.Error(w, strings.Repeat("no\xff ", 100<<10), http.StatusInternalServerError)
		case strings.HasSuffix(p, "/"+idA+"/json"):
			fmt.Fprint(w, `{"Id":"`)
		}
	}))
	if _, err := e.Create(t.Context(), &translate.Create{
		Name:   "x",
		Config: &container.Config{Image: "app"},
		Host:   &container.HostConfig{},
	}); !errors.Is(err, tolerant.ErrTooLarge) {
		t.Errorf("Create: error %v, want ErrTooLarge", err)
	}

	if _, err := e.Objects(t.Context()); !errors.Is(err, tolerant.ErrTooLarge) {
		t.Errorf("Objects: error %v, want ErrTooLarge", err)
	}

	err := e.Start(t.Context(), model.ContainerID(idA))
	if err == nil || len(err.Error()) > text.MaxMessage+200 || !utf8.ValidString(err.Error()) ||
		!errdefs.IsInternal(err) {
		t.Errorf("Start: error of %d bytes: %.200v", len(fmt.Sprint(err)), err)
	}

	err = e.Stop(t.Context(), model.ContainerID(idA), time.Second)
	if err == nil || len(err.Error()) > text.MaxMessage+200 || !utf8.ValidString(err.Error()) ||
		!errdefs.IsInternal(err) || !strings.Contains(err.Error(), "Error response from daemon: no") {
		t.Errorf("Stop: error of %d bytes: %.200v", len(fmt.Sprint(err)), err)
	}

	if _, err := e.Inspect(t.Context(), model.ContainerID(idA)); !errdefs.IsDataLoss(err) {
		t.Errorf("truncated inspect: error %v, want DataLoss", err)
	}
}

// TestRequestsHaveDeadlines checks that the guard sets a deadline for all requests except streams.
func TestRequestsHaveDeadlines(t *testing.T) {
	for _, c := range []struct {
		method, path string
		want         time.Duration
	}{
		{"GET", "/v1.41/containers/json", readTimeout},
		{"HEAD", "/_ping", readTimeout},
		{"GET", "/v1.41/events", 0},
		{"POST", "/v1.41/images/create", 0},
		{"POST", "/v1.41/containers/x/start", changeTimeout},
		{"POST", "/v1.41/containers/x/stop?t=90", changeTimeout + 90*time.Second},
		{"POST", "/v1.41/containers/x/stop?t=-1", changeTimeout},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			var deadline time.Time
			g := guard{roundTripper(func(r *http.Request) (*http.Response, error) {
				deadline, _ = r.Context().Deadline()
				return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
			})}

			resp, err := g.RoundTrip(httptest.NewRequest(c.method, c.path, nil))
			if err != nil {
				t.Fatal(err)
			}

			resp.Body.Close()
			got := time.Until(deadline)
			if deadline.IsZero() != (c.want == 0) || c.want != 0 && (got > c.want || got < c.want-time.Minute) {
				t.Errorf("deadline in %s, want %s", got, c.want)
			}
		})
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// FuzzEngineResponses returns raw bytes as the response to each request. Each call must return an
// error or a valid record, and must not panic.
func FuzzEngineResponses(f *testing.F) {
	for _, config := range hostileConfigs {
		if len(config) < 1<<10 {
			f.Add([]byte(strings.ReplaceAll(inspectOf(idA, "p", config), strings.Repeat("l", 3<<20), "l")), uint16(200))
		}
	}

	f.Add([]byte(`[{"Id":"`+idA+`","Names":["/x"],"Labels":{"a":1}},null]`), uint16(200))
	f.Add([]byte(`[{"Id":"sha256:`+idA+`","RepoTags":["a:1","\ud800"],"Size":1e3}]`), uint16(200))
	f.Add([]byte(`{"message":"`+"\xff"+`"}`), uint16(500))
	f.Add([]byte(`{"status":"Downloading","progressDetail":{"current":-1},"id":"x"}`+"\r\n"+
		`{"errorDetail":{"message":7},"error":[]}`), uint16(200))
	f.Add([]byte(`{"ServerVersion":1,"Runtimes":{"runc":7},"DriverStatus":[["a"],7],"SecurityOptions":"x"}`),
		uint16(404))
	var body []byte
	status := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		if strings.HasSuffix(r.URL.Path, "/_ping") {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		w.Write(body) //nolint:errcheck // the client reads it
	}))

	f.Cleanup(server.Close)
	e, err := New(Config{Endpoint: "tcp://" + server.Listener.Addr().String(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}

	f.Cleanup(func() { e.Close() })
	f.Fuzz(func(t *testing.T, response []byte, code uint16) {
		body, status = response, 200+int(code)%400
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()

		check := func(call string, err error) {
			if err != nil && (!utf8.ValidString(err.Error()) || len(err.Error()) > 64<<10) {
				t.Errorf("%s: error of %d bytes: %.200q", call, len(err.Error()), err)
			}
			if errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s hangs", call)
			}
		}

		o, err := e.Inspect(ctx, model.ContainerID(idA))
		check("Inspect", err)
		validObject(t, o)
		_, _, err = e.FindByName(ctx, "x")
		check("FindByName", err)
		objects, err := e.Objects(ctx)
		check("Objects", err)
		for _, o := range objects {
			validObject(t, o)
		}

		images, err := e.Images(ctx)
		check("Images", err)
		for _, i := range images {
			i.CRI(false)
		}

		for call, do := range callsOf(ctx, e) {
			check(call, do())
		}
	})
}

// callsOf returns calls of an engine without interest in their results.
func callsOf(ctx context.Context, e *Engine) map[string]func() error {
	return map[string]func() error{
		"Misfits":      func() error { _, err := e.Misfits(ctx); return err },
		"HeldImages":   func() error { _, err := e.HeldImages(ctx); return err },
		"ImageUsers":   func() error { _, err := e.ImageUsers(ctx, model.ImageID("sha256:"+idA)); return err },
		"Image":        func() error { _, err := e.Image(ctx, "app"); return err },
		"HoldImage":    func() error { _, err := e.HoldImage(ctx, model.ImageID("sha256:"+idA)); return err },
		"Start":        func() error { return e.Start(ctx, model.ContainerID(idA)) },
		"Stop":         func() error { return e.Stop(ctx, model.ContainerID(idA), 0) },
		"Update":       func() error { return e.Update(ctx, model.ContainerID(idA), &translate.Update{}) },
		"RemoveImage":  func() error { return e.RemoveImage(ctx, "app") },
		"LoadImage":    func() error { return e.LoadImage(ctx, strings.NewReader("")) },
		"Pull":         func() error { _, err := e.Pull(ctx, "app", nil); return err },
		"ResolveImage": func() error { return e.ResolveImage(ctx, "app") },
		"Host":         func() error { _, err := e.Host(ctx); return err },
		"Exec": func() error {
			_, err := e.Exec(ctx, model.ContainerID(idA), Exec{Cmd: []string{"true"}})
			return err
		},
		"Create": func() error {
			_, err := e.Create(ctx, &translate.Create{
				Name:   "x",
				Config: &container.Config{Image: "app"},
				Host:   &container.HostConfig{},
			})
			return err
		},
	}
}

func validObject(t *testing.T, o model.Object) {
	t.Helper()
	if s := o.Sandbox; s != nil {
		s.Status(nil)
		if len(s.ID) != 64 {
			t.Errorf("sandbox %q", s.ID)
		}
	}

	if c := o.Container; c != nil {
		c.Status()
		if len(c.ID) != 64 {
			t.Errorf("container %q", c.ID)
		}
	}
}

// FuzzEvents returns raw bytes as the event stream. Each line is an event, a missed event, or
// ignored.
func FuzzEvents(f *testing.F) {
	die := `{"Type":"container","Action":"die","Actor":{"ID":"` + idA + `","Attributes":{"exitCode":"1","l":"x"}},` +
		`"timeNano":1}` + "\n"
	for _, s := range []string{
		die, "\x1e" + die, `{"Type":"image"}` + "\n\n" + die, "nonsense\n" + die, `{"Type":7,"Action":[]}` + "\n" + die,
		`[1]` + "\n" + die,
		`{"Type":"container","Action":"die","Actor":{"ID":"../x"}}` + "\n" + die, `{"Type":"container"` + "\n" + die,
		strings.Repeat("a", 100<<10) + "\n" + die,
	} {
		f.Add([]byte(s))
	}

	e := &Engine{cfg: Config{Log: slog.New(slog.DiscardHandler)}}
	f.Fuzz(func(t *testing.T, stream []byte) {
		received, hasDied := 0, false
		err := e.follow(bytes.NewReader(append(append(bytes.Clone(stream), '\n'), die...)), func(ev Event) {
			received++
			if !ev.Missed && !ev.Image && len(ev.ID) != 64 {
				t.Errorf("event with an invalid ID: %+v", ev)
			}
			hasDied = hasDied || ev.Kind == Died && string(ev.ID) == idA && ev.ExitCode == 1
		})
		if !errors.Is(err, io.EOF) || !hasDied { // a valid event arrives despite any input before it
			t.Errorf("received %d events, valid event received: %v, error %v", received, hasDied, err)
		}

		if max := bytes.Count(stream, []byte("\n")) + 2; received > max {
			t.Errorf("received %d events for %d lines", received, max)
		}
	})
}

// TestEventsOfAnySize checks that an event with 17 MiB of labels arrives, and that an unreadable
// event does not affect others.
func TestEventsOfAnySize(t *testing.T) {
	labels := `"l":"` + strings.Repeat("x", 17<<20) + `",` + strings.Repeat(`"k":"v",`, 1<<20)
	die := `{"Type":"container","Action":"die","Actor":{"ID":"` + idA + `","Attributes":{"a":"b",` + labels +
		`"exitCode":"3"}},"timeNano":5}` + "\n"
	bad := `{"Type":"container","Action":"die","Actor":{"ID":` + "\n"
	e := &Engine{cfg: Config{Log: slog.New(slog.DiscardHandler)}}
	var got []Event
	err := e.follow(strings.NewReader(die+bad+die+`{"Type":"volume"}`+"\n"), func(ev Event) { got = append(got, ev) })
	want := Event{ID: model.ContainerID(idA), Kind: Died, ExitCode: 3, At: time.Unix(0, 5)}
	if !errors.Is(err, io.EOF) || len(got) != 3 || got[0] != want || !got[1].Missed || got[2] != want {
		t.Errorf("events %+v, error %v", got, err)
	}

	endless := io.MultiReader(strings.NewReader(`{"a":"`), zeros{})
	if err := e.follow(endless, func(Event) {}); !errors.Is(err, tolerant.ErrTooLarge) {
		t.Errorf("endless event: error %v, want ErrTooLarge", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
