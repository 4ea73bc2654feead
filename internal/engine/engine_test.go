package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/keylock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMinOOMScore(t *testing.T) {
	for _, c := range []struct {
		caps, score string
		want        int
	}{
		{"000001ffffffffff", "0", -1000},
		{"000001fffeffffff", "0", 0},
		{"000001fffeffffff", "-500", -500},
		{"0000000000000000", "200", 200},
	} {
		t.Run(c.caps+" "+c.score, func(t *testing.T) {
			dir := t.TempDir()
			for file, content := range map[string]string{
				"status":        "Name:\tx\nCapEff:\t" + c.caps + "\n",
				"oom_score_adj": c.score + "\n",
			} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}

			if got := minOOMScore(dir); got != c.want {
				t.Errorf("minOOMScore = %d, want %d", got, c.want)
			}
		})
	}
}

func TestProcessTree(t *testing.T) {
	all := []process{
		{1, 0, 1}, {10, 1, 10}, {11, 10, 10}, {12, 11, 12}, {13, 1, 10}, {14, 12, 14}, {20, 1, 20}, {21, 20, 20},
	}
	got := processTree(all, 10)
	slices.Sort(got)
	if want := []int{10, 11, 12, 13, 14}; !slices.Equal(got, want) {
		t.Errorf("processTree = %v, want %v", got, want)
	}
}

// TestKillTreeChecksCgroup checks that killTree kills only processes in the container's cgroup.
func TestKillTreeChecksCgroup(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()         //nolint:errcheck // killed
	defer cmd.Process.Kill() //nolint:errcheck // it ends the test all the same

	if err := killTree("/proc", cmd.Process.Pid, strings.Repeat("a", 64)); err != nil {
		t.Error(err)
	}

	if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process outside the container was killed: %v", err)
	}

	if killed, err := sendSignals("/proc", 1<<22-1, "x", syscall.SIGKILL); killed || err != nil {
		t.Errorf("signal to an unknown PID: sent %v, error %v", killed, err)
	}
}

// TestProgress checks the metrics of a pull with a restarted download.
func TestProgress(t *testing.T) {
	m := newPullMetrics()
	var log bytes.Buffer
	p := newProgress(newWatchdog(0, &activity{}, nil),
		slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), m)
	if got := testutil.ToFloat64(m.active); got != 1 {
		t.Errorf("%v active pulls, want 1", got)
	}

	p.logged = time.Time{} // a log entry is due
	for _, x := range []struct {
		id, status     string
		current, total int64
		units          string
	}{
		{"", "Pulling from app", 0, 0, ""},
		{"one", "Downloading", 100, 1000, ""},
		{"one", "Downloading", 400, 1000, ""},
		{"two", "Downloading", 50, 500, ""},
		{"two", "Downloading", 0, 500, ""},
		{"two", "Downloading", 60, 500, ""},
		{"one", "Download complete", 0, 0, ""},
		{"two", "Download complete", 0, 0, ""},
		{"one", "Extracting", 300, 1000, ""},
		{"one", "Pull complete", 0, 0, ""},
		{"two", "Extracting", 7, 0, "s"},
		{"two", "Pull complete", 0, 0, ""},
	} {
		p.observe(jsonstream.Message{
			ID:       x.id,
			Status:   x.status,
			Progress: &jsonstream.Progress{Current: x.current, Total: x.total, Units: x.units},
		})
	}

	p.end(nil)
	if got := testutil.ToFloat64(m.bytes.WithLabelValues(downloading)); got != 1000+50+500 {
		t.Errorf("%v bytes downloaded, want %d", got, 1000+50+500)
	}
	if got := testutil.ToFloat64(m.bytes.WithLabelValues(extracting)); got != 1000 {
		t.Errorf("%v bytes extracted, want 1000", got)
	}
	if got := testutil.ToFloat64(m.active); got != 0 {
		t.Errorf("%v active pulls after the end, want 0", got)
	}
	if testutil.CollectAndCount(m.seconds) != 1 || strings.Count(log.String(), "image pull in progress") != 1 {
		t.Errorf("unexpected log: %s", &log)
	}
}

// TestPullError uses messages of real engines.
func TestPullError(t *testing.T) {
	other := func(err error) bool {
		return !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) && !errdefs.IsPermissionDenied(err)
	}
	const head = "unknown: unexpected status from HEAD request to http://127.0.0.1:5000/v2/x/manifests/1: "

	for _, c := range []struct {
		kind  func(error) bool
		texts []string
	}{
		{errdefs.IsNotFound, []string{
			`failed to resolve reference "127.0.0.1:5000/ok:2": 127.0.0.1:5000/ok:2: not found`,
			"manifest for 127.0.0.1:5000/ok:2 not found: manifest unknown: Unknown manifest",
			"repository 127.0.0.1:5000/nothing not found: name unknown: Unknown name",
			`unknown: {"errors":[{"code":"NAME_UNKNOWN","message":"Unknown name"}]}`,
			`unknown: {"errors":[{"code":"MANIFEST_UNKNOWN","message":"Unknown manifest"}]}`,
		}},
		{errdefs.IsPermissionDenied, []string{
			"pull access denied for 127.0.0.1:5000/x, repository does not exist or may require 'docker login': " +
				"denied: requested access to the resource is denied",
			"unauthorized: authentication required",
			"pull access denied, repository does not exist or may require authorization: authorization failed: " +
				"no basic auth credentials",
			head + "401 Unauthorized",
		}},
		{errdefs.IsUnavailable, []string{
			"toomanyrequests: You have reached your pull rate limit",
			head + "429 Too Many Requests",
			"received unexpected HTTP status: 503 Service Unavailable",
			head + "500 Internal Server Error",
			`Get "https://192.0.2.1:5000/v2/": http: server gave HTTP response to HTTPS client`,
			`Get "https://registry.example/v2/": x509: certificate signed by unknown authority`,
			`failed to do request: Head "https://127.0.0.1:1/v2/x/manifests/1": dial tcp 127.0.0.1:1: connect: ` +
				`connection refused`,
			"short read: expected 101921 bytes but got 8192: unexpected EOF",
		}},
		{other, []string{
			"failed to register layer: Error processing tar file(exit status 1): write /x: no space left on device",
		}},
	} {
		for _, text := range c.texts {
			if err := pullError(errors.New(text)); !c.kind(err) || !strings.Contains(err.Error(), text) {
				t.Errorf("pullError(%q) has an unexpected kind or text: %v", text, err)
			}
		}
	}

	err := pullError(fmt.Errorf("x denied: %w", errdefs.ErrNotFound))
	if !errdefs.IsPermissionDenied(err) || errdefs.IsNotFound(err) {
		t.Errorf("pullError keeps the engine's kind: %v", err)
	}
}

func TestCallGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g callGroup[string]
		var calls atomic.Int32
		cancelled := make(chan struct{})
		call := func(ctx context.Context) (string, error) {
			n := calls.Add(1)
			select {
			case <-time.After(time.Minute):
				return fmt.Sprint("result ", n), nil
			case <-ctx.Done():
				cancelled <- struct{}{}
				return "", ctx.Err()
			}
		}

		cancellable, cancel := context.WithCancel(t.Context())
		type result struct {
			id  string
			err error
		}

		results := make(chan result, 5)
		start := func(ctx context.Context, key string) {
			go func() {
				id, err := g.do(ctx, key, call)
				results <- result{id, err}
			}()
		}

		start(cancellable, "one") // the first caller is cancelled, the others get the result
		synctest.Wait()
		start(t.Context(), "one")
		start(t.Context(), "one")
		synctest.Wait()
		cancel()
		if r := <-results; !errors.Is(r.err, context.Canceled) {
			t.Errorf("cancelled caller: %v", r)
		}

		for range 2 {
			if r := <-results; r.err != nil || r.id != "result 1" {
				t.Errorf("result %v, want result 1", r)
			}
		}

		start(t.Context(), "one") // a later caller starts a new call
		if r := <-results; r.id != "result 2" {
			t.Errorf("result %v, want result 2", r)
		}

		cancellable, cancel = context.WithCancel(t.Context())
		start(cancellable, "one")
		start(cancellable, "one")
		synctest.Wait()
		cancel() // all callers of the call
		<-cancelled
		<-results
		<-results
		if n := calls.Load(); n != 3 || len(g.calls) != 0 {
			t.Errorf("%d calls, want 3; %d entries remain, want 0", n, len(g.calls))
		}
	})
}

func TestAuthHeader(t *testing.T) {
	for name, c := range map[string]struct {
		auth      *runtimeapi.AuthConfig
		isValid   bool
		hasHeader bool
	}{
		"none":           {nil, true, false},
		"user":           {&runtimeapi.AuthConfig{Username: "u", Password: "p"}, true, true},
		"auth":           {&runtimeapi.AuthConfig{Auth: "dTpw"}, true, true},
		"not base64":     {&runtimeapi.AuthConfig{Auth: "!"}, false, false},
		"no password":    {&runtimeapi.AuthConfig{Auth: "dXA="}, false, false},
		"registry token": {&runtimeapi.AuthConfig{RegistryToken: "t"}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := authHeader(c.auth)
			if (err == nil) != c.isValid || (h != "") != c.hasHeader {
				t.Errorf("header %q, error %v", h, err)
			}
			if err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v, want InvalidArgument", err)
			}
		})
	}
}

func TestStreamError(t *testing.T) {
	if err := streamError(strings.NewReader(`{"status":"a"}{"stream":"b"}`)); err != nil {
		t.Error(err)
	}

	err := streamError(strings.NewReader(`{"status":"a"}{"error":"no space left","errorDetail":{}}`))
	if err == nil || err.Error() != "no space left" {
		t.Error(err)
	}
}

// engineOf returns an Engine connected to a handler.
func engineOf(t *testing.T, h http.Handler) *Engine {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	srv := &http.Server{Handler: h}
	go srv.Serve(l) //nolint:errcheck // ends with Close
	e, err := New(Config{
		Endpoint:     "unix://" + socket,
		PullDeadline: 100 * time.Millisecond,
		Log:          slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { e.Close(); srv.Close() })

	return e
}

func TestOldEngineIsRejected(t *testing.T) {
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.40")
		if strings.HasSuffix(r.URL.Path, "/info") {
			fmt.Fprint(w, `{"ServerVersion":"19.03.15"}`)
		}
	}))
	if _, err := e.Host(t.Context()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "20.10") {
		t.Errorf("Host: %v", err)
	}
}

// TestEngineChangesVersion restarts the engine with newer and older API versions during calls.
func TestEngineChangesVersion(t *testing.T) {
	var api atomic.Value
	api.Store("1.41")
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", api.Load().(string))
		if strings.HasSuffix(r.URL.Path, "/json") {
			fmt.Fprint(w, "[]")
			return
		}
		fmt.Fprint(w, `{"ServerVersion":"x","Architecture":"x86_64"}`)
	}))

	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)

		for {
			select {
			case <-stop:
				return
			default:
			}

			if _, err := e.Images(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}()

	for _, v := range []string{"1.41", "1.50", "1.44", "1.51"} {
		api.Store(v)
		h, err := e.Host(t.Context())
		if err != nil || h.APIVersion != v {
			t.Errorf("API %s, %v; want %s", h.APIVersion, err, v)
		}
	}

	close(stop)
	<-stopped
}

// TestInspectErrorOfOneObject checks that an inspect error omits only the object in question.
func TestInspectErrorOfOneObject(t *testing.T) {
	good, odd := strings.Repeat("a", 64), strings.Repeat("b", 64)
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/images/json"):
			fmt.Fprintf(w, `[{"Id":"sha256:%s"},{"Id":"sha256:%s"}]`, good, odd)
		case strings.HasSuffix(p, "/containers/json"):
			fmt.Fprintf(w, `[{"Id":%q},{"Id":%q}]`, good, odd)
		case strings.HasSuffix(p, "/images/sha256:"+good+"/json"):
			fmt.Fprintf(w, `{"Id":"sha256:%s"}`, good)
		case strings.HasSuffix(p, "/"+good+"/json"):
			fmt.Fprintf(w, `{"Id":%q,"Name":"/k8s_POD_p_ns_u_0","Image":"sha256:%s",
				"Config":{"Labels":{"io.kubernetes.docker.type":"podsandbox"}}}`, good, good)
		case strings.HasSuffix(p, odd+"/json"):
			http.Error(w, `{"message":"layer does not exist"}`, http.StatusInternalServerError)
		}
	}))

	images, err := e.Images(t.Context())
	if err != nil || len(images) != 1 || images[0].ID.Hex() != good {
		t.Errorf("Images: %v, %v", images, err)
	}

	objects, err := e.Objects(t.Context())
	if err != nil || len(objects) != 2 || objects[0].Sandbox == nil || objects[1].Sandbox != nil {
		t.Errorf("Objects: %+v, %v", objects, err)
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Images(ended); err == nil {
		t.Error("Images returned no error with a cancelled context")
	}
}

// TestImageCache checks that an image is inspected if it is new, if its list entry has changed, and
// after a call of Image. A lookup does not wait for a list in progress.
func TestImageCache(t *testing.T) {
	var inspected, held atomic.Int32
	var tags atomic.Value
	tags.Store(`"app:1"`)
	one := "sha256:" + strings.Repeat("1", 64)
	resume, listing := make(chan struct{}), make(chan struct{}, 1)
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/images/json"):
			if held.Load() > 0 {
				listing <- struct{}{}
				<-resume
			}
			fmt.Fprintf(w, `[{"Id":%q,"RepoTags":[%s]}]`, one, tags.Load())

		case strings.HasSuffix(p, "/"+one+"/json"), strings.HasSuffix(p, "/app:1/json"):
			inspected.Add(1)
			fmt.Fprintf(w, `{"Id":%q,"RepoTags":[%s]}`, one, tags.Load())
		}
	}))

	list := func(want int32) {
		t.Helper()
		if images, err := e.Images(t.Context()); err != nil || len(images) != 1 || inspected.Load() != want {
			t.Errorf("Images: %v, %v, %d inspects; want %d", images, err, inspected.Load(), want)
		}
	}

	list(1)
	list(1)
	tags.Store(`"app:1","app:2"`)
	list(2)
	list(2)
	if _, err := e.Image(t.Context(), "app:1"); err != nil {
		t.Error(err)
	}

	list(4) // one inspect by Image, and one by the list
	list(4)
	held.Store(1)
	done := make(chan struct{})
	go func() { defer close(done); list(4) }()
	<-listing
	if !e.images.has("app:2") || e.images.has("app:3") {
		t.Error("the cache does not have the last list during a new one")
	}

	close(resume)
	<-done
}

func TestEngineDown(t *testing.T) {
	e, err := New(Config{
		Endpoint: "unix://" + filepath.Join(t.TempDir(), "nobody"),
		Log:      slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	if _, err := e.Host(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("Host: %v", err)
	}

	if _, err := e.PauseImage(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("PauseImage: %v", err)
	}
}

// TestStalledPull sends one message and no further progress.
func TestStalledPull(t *testing.T) {
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		if strings.HasSuffix(r.URL.Path, "/images/create") {
			fmt.Fprintln(w, `{"id":"layer1","status":"Downloading"}`)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))

	_, err := e.Pull(t.Context(), "registry.example/app:1", nil)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "layer1 Downloading") {
		t.Errorf("stalled pull: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Pull(ctx, "registry.example/app:1", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled pull: %v", err)
	}
}

// TestWaitsHonourContext checks that waiting for an image list or for the load of the pause image
// ends with ctx.
func TestWaitsHonourContext(t *testing.T) {
	e, err := New(Config{Endpoint: "unix:///nobody", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	arch := "amd64"
	e.arch.Store(&arch)
	for name, call := range map[string]struct {
		lock *keylock.Map
		do   func(ctx context.Context) error
	}{
		"list":       {&e.images.listing, func(ctx context.Context) error { _, err := e.Images(ctx); return err }},
		"load pause": {&e.loading, func(ctx context.Context) error { _, err := e.PauseImage(ctx); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			unlock, err := call.lock.Lock(t.Context(), allKeys)
			if err != nil {
				t.Fatal(err)
			}
			defer unlock()

			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()

			if err := call.do(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want DeadlineExceeded", err)
			}
		})
	}
}

// TestHangingInspects checks that one container and one image without an inspect response delay the
// others only briefly. Both have the data of the lists, and the image keeps its last known state.
func TestHangingInspects(t *testing.T) {
	good, odd := strings.Repeat("a", 64), strings.Repeat("b", 64)
	var hangs atomic.Bool
	var tag atomic.Value
	tag.Store("odd:1")
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/images/json"):
			fmt.Fprintf(w, `[{"Id":"sha256:%s","RepoTags":[%q]},{"Id":"sha256:%s"}]`, odd, tag.Load(), good)
		case strings.HasSuffix(p, "/containers/json"):
			fmt.Fprintf(w, `[{"Id":%q,"Names":["/k8s_POD_o_ns_u_0"],"State":"running"},{"Id":%q}]`, odd, good)
		case strings.HasSuffix(p, odd+"/json") && hangs.Load():
			<-r.Context().Done()
		case strings.Contains(p, "/images/"):
			fmt.Fprintf(w, `{"Id":"sha256:%s","Config":{"Cmd":["sh"],"User":"7"}}`, p[len(p)-69:len(p)-5])
		case strings.HasSuffix(p, "/"+good+"/json"):
			fmt.Fprintf(w, `{"Id":%q,"Name":"/k8s_POD_p_ns_u_0","Image":"sha256:%s",
				"Config":{"Labels":{"io.kubernetes.docker.type":"podsandbox"}}}`, good, good)
		}
	}))
	if images, err := e.Images(t.Context()); err != nil || len(images) != 2 || images[0].Stale ||
		!images[0].Entrypoint {
		t.Fatalf("Images: %+v, %v", images, err)
	}

	var log bytes.Buffer
	e.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	hangs.Store(true)
	tag.Store("odd:2")
	begin := time.Now()
	images, err := e.Images(t.Context())
	if err != nil || len(images) != 2 || !images[0].Stale || images[0].User != "7" || !images[0].HasName("odd:2") ||
		images[1].Stale {
		t.Errorf("Images: %+v, %v", images, err)
	}

	objects, err := e.Objects(t.Context())
	if err != nil || len(objects) != 2 || string(objects[0].Unread) != odd || objects[1].Sandbox == nil {
		t.Errorf("Objects: %+v, %v", objects, err)
	}

	if d := time.Since(begin); d < 2*stragglerTimeout {
		t.Errorf("the lists took %s, want at least %s", d, 2*stragglerTimeout)
	}

	if images, err := e.Images(t.Context()); err != nil || len(images) != 2 || !images[0].Stale {
		t.Errorf("Images once more: %+v, %v", images, err)
	}
	if n := strings.Count(log.String(), "failed to inspect image in time"); n != 1 {
		t.Errorf("%d warnings of two lists, want 1:\n%s", n, &log)
	}

	hangs.Store(false)
	if images, err := e.Images(t.Context()); err != nil || len(images) != 2 || images[0].Stale {
		t.Errorf("Images after the engine recovered: %+v, %v", images, err)
	}
}
