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
		{"000001ffffffffff", "0", -1000}, {"000001fffeffffff", "0", 0}, {"000001fffeffffff", "-500", -500},
		{"0000000000000000", "200", 200},
	} {
		dir := t.TempDir()
		for file, content := range map[string]string{"status": "Name:\tx\nCapEff:\t" + c.caps +
			"\n", "oom_score_adj": c.score + "\n"} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}

		if got := minOOMScore(dir); got != c.want {
			t.Errorf("capabilities %s, score %s: %d, want %d", c.caps, c.score, got, c.want)
		}
	}
}

func TestFamily(t *testing.T) {
	all := []process{{1, 0, 1}, {10, 1, 10}, {11, 10, 10}, {12, 11, 12}, {13, 1, 10}, {14, 12, 14}, {20, 1, 20},
		{21, 20, 20}}
	got := family(all, 10)
	slices.Sort(got)
	if want := []int{10, 11, 12, 13, 14}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestKillTreeKeepsToTheCgroup kills nothing that is not in the container's cgroup.
func TestKillTreeKeepsToTheCgroup(t *testing.T) {
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
		t.Errorf("a PID that does not exist: %v, %v", killed, err)
	}
}

// TestProgress: the figures of a pull are what the engine's messages add up to, also when a
// download begins again.
func TestProgress(t *testing.T) {
	m := newPullMetrics()
	var log bytes.Buffer
	p := newProgress(newWatchdog(0, &movement{}, nil),
		slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), m)
	if got := testutil.ToFloat64(m.active); got != 1 {
		t.Errorf("%v pulls are active", got)
	}

	p.told = time.Time{} // long ago
	for _, x := range []struct {
		id, status     string
		current, total int64
		units          string
	}{
		{"", "Pulling from app", 0, 0, ""}, {"one", "Downloading", 100, 1000, ""},
		{"one", "Downloading", 400, 1000, ""}, {"two", "Downloading", 50, 500, ""},
		{"two", "Downloading", 0, 500, ""}, {"two", "Downloading", 60, 500, ""}, {"one", "Download complete", 0, 0, ""},
		{"two", "Download complete", 0, 0, ""},
		{"one", "Extracting", 300, 1000, ""}, {"one", "Pull complete", 0, 0, ""}, {"two", "Extracting", 7, 0, "s"},
		{"two", "Pull complete", 0, 0, ""},
	} {
		p.saw(jsonstream.Message{
			ID:       x.id,
			Status:   x.status,
			Progress: &jsonstream.Progress{Current: x.current, Total: x.total, Units: x.units},
		})
	}

	p.end(nil)
	if got := testutil.ToFloat64(m.bytes.WithLabelValues(downloading)); got != 1000+50+500 {
		t.Errorf("downloaded %v", got)
	}
	if got := testutil.ToFloat64(m.bytes.WithLabelValues(extracting)); got != 1000 {
		t.Errorf("extracted %v", got)
	}
	if got := testutil.ToFloat64(m.active); got != 0 {
		t.Errorf("%v pulls are active afterwards", got)
	}
	if testutil.CollectAndCount(m.seconds) != 1 || strings.Count(log.String(), "pull goes on") != 1 {
		t.Errorf("log: %s", &log)
	}
}

// TestPullError takes what engines really say.
func TestPullError(t *testing.T) {
	for text, want := range map[string]func(error) bool{
		`failed to resolve reference "127.0.0.1:5000/ok:2": 127.0.0.1:5000/ok:2: not found`: errdefs.IsNotFound,
		"manifest for 127.0.0.1:5000/ok:2 not found: manifest unknown: Unknown " +
			"manifest": errdefs.IsNotFound,
		"repository 127.0.0.1:5000/nothing not found: name unknown: Unknown name": errdefs.IsNotFound,
		"pull access denied for 127.0.0.1:5000/x, repository does not exist or may require 'docker login': denied: " +
			"says the test": errdefs.IsPermissionDenied,
		"unauthorized: authentication required": errdefs.IsPermissionDenied,
		"pull access denied, repository does not exist or may require authorization: authorization failed: no basic " +
			"auth credentials": errdefs.IsPermissionDenied,
		"unknown: unexpected status from HEAD request to http://127.0.0.1:5000/v2/basic/manifests/1: 401 " +
			"Unauthorized": errdefs.IsPermissionDenied,
		"toomanyrequests: You have reached your pull rate limit": errdefs.IsUnavailable,
		"unknown: unexpected status from HEAD request to http://127.0.0.1:5000/v2/x/manifests/1: 429 Too Many " +
			"Requests": errdefs.IsUnavailable,
		"received unexpected HTTP status: 503 Service " +
			"Unavailable": errdefs.IsUnavailable,
		"unknown: unexpected status from HEAD request to http://127.0.0.1:5000/v2/x/manifests/1: 500 Internal " +
			"Server Error": errdefs.IsUnavailable,
		`Get "https://192.0.2.1:5000/v2/": http: server gave HTTP response to HTTPS client`: errdefs.IsUnavailable,
		`Get "https://registry.example/v2/": x509: certificate signed by unknown ` +
			`authority`: errdefs.IsUnavailable,
		`failed to do request: Head "https://127.0.0.1:1/v2/x/manifests/1": dial tcp 127.0.0.1:1: connect: ` +
			`connection refused`: errdefs.IsUnavailable,
		"short read: expected 101921 bytes but got 8192: unexpected EOF": errdefs.IsUnavailable,
		"failed to register layer: Error processing tar file(exit status 1): write /x: no space left on device": func(err error) bool {
			return !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) && !errdefs.IsPermissionDenied(err)
		},
	} {
		if err := pullError(fmt.Errorf("%s", text)); !want(err) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v", err)
		}
	}

	if err := pullError(fmt.Errorf("x denied: %w", errdefs.ErrNotFound)); !errdefs.IsPermissionDenied(err) ||
		errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

func TestSharedCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared
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

		impatient, leave := context.WithCancel(t.Context())
		type result struct {
			id  string
			err error
		}

		results := make(chan result, 5)
		ask := func(ctx context.Context, key string) {
			go func() {
				id, err := s.do(ctx, key, call)
				results <- result{id, err}
			}()
		}

		ask(impatient, "one") // who came first goes, and the others have their result
		synctest.Wait()
		ask(t.Context(), "one")
		ask(t.Context(), "one")
		synctest.Wait()
		leave()
		if r := <-results; !errors.Is(r.err, context.Canceled) {
			t.Errorf("who left: %v", r)
		}

		for range 2 {
			if r := <-results; r.err != nil || r.id != "result 1" {
				t.Errorf("%v", r)
			}
		}

		ask(t.Context(), "one") // not the old result
		if r := <-results; r.id != "result 2" {
			t.Errorf("%v", r)
		}

		impatient, leave = context.WithCancel(t.Context())
		ask(impatient, "one")
		ask(impatient, "one")
		synctest.Wait()
		leave() // all who wanted it
		<-cancelled
		<-results
		<-results
		if n := calls.Load(); n != 3 || len(s.calls) != 0 {
			t.Errorf("%d calls, %d kept", n, len(s.calls))
		}
	})
}

func TestAuthHeader(t *testing.T) {
	for _, c := range []struct {
		a    *runtimeapi.AuthConfig
		ok   bool
		some bool
	}{
		{nil, true, false}, {&runtimeapi.AuthConfig{Username: "u", Password: "p"}, true, true},
		{&runtimeapi.AuthConfig{Auth: "dTpw"}, true, true},
		{&runtimeapi.AuthConfig{Auth: "!"}, false, false}, {&runtimeapi.AuthConfig{Auth: "dXA="}, false, false},
		{&runtimeapi.AuthConfig{RegistryToken: "t"}, true, true},
	} {
		h, err := authHeader(c.a)
		if (err == nil) != c.ok || (h != "") != c.some {
			t.Errorf("%v: %q, %v", c.a, h, err)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: kind of %v", c.a, err)
		}
	}
}

func TestStreamError(t *testing.T) {
	if err := streamError(strings.NewReader(`{"status":"a"}{"stream":"b"}`)); err != nil {
		t.Error(err)
	}
	if err := streamError(strings.NewReader(`{"status":"a"}{"error":"no space left","errorDetail":{}}`)); err == nil ||
		err.Error() != "no space left" {
		t.Error(err)
	}
}

// engineOf serves a handler as an engine on a socket.
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

func TestTooOldAnEngineIsRefused(t *testing.T) {
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.40")
		if strings.HasSuffix(r.URL.Path, "/info") {
			fmt.Fprint(w, `{"ServerVersion":"19.03.15"}`)
		}
	}))
	if _, err := e.Host(t.Context()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "20.10") {
		t.Errorf("%v", err)
	}
}

// TestEngineOfAnotherVersion: after its restart the engine is newer, or older, while calls are
// under way.
func TestEngineOfAnotherVersion(t *testing.T) {
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

// TestEngineCannotDescribeOne: what the engine answers to an inspect with an error is left out, and
// the others are not.
func TestEngineCannotDescribeOne(t *testing.T) {
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
		t.Error("Images with a context that has ended: no error")
	}
}

// TestImageCache: an image is inspected when it is new, when the list says something else of it,
// and when it was looked for; who asks whether an image is there does not wait for a look that is
// under way.
func TestImageCache(t *testing.T) {
	var inspected, held atomic.Int32
	var tags atomic.Value
	tags.Store(`"app:1"`)
	one := "sha256:" + strings.Repeat("1", 64)
	goOn, listing := make(chan struct{}), make(chan struct{}, 1)
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/images/json"):
			if held.Load() > 0 {
				listing <- struct{}{}
				<-goOn
			}
			fmt.Fprintf(w, `[{"Id":%q,"RepoTags":[%s]}]`, one, tags.Load())

		case strings.HasSuffix(p, "/"+one+"/json"), strings.HasSuffix(p, "/app:1/json"):
			inspected.Add(1)
			fmt.Fprintf(w, `{"Id":%q,"RepoTags":[%s]}`, one, tags.Load())
		}
	}))

	look := func(want int32) {
		t.Helper()
		if images, err := e.Images(t.Context()); err != nil || len(images) != 1 || inspected.Load() != want {
			t.Errorf("Images: %v, %v, %d inspects; want %d", images, err, inspected.Load(), want)
		}
	}

	look(1)
	look(1)
	tags.Store(`"app:1","app:2"`)
	look(2)
	look(2)
	if _, err := e.Image(t.Context(), "app:1"); err != nil {
		t.Error(err)
	}

	look(4) // Image's own, and the look's
	look(4)
	held.Store(1)
	done := make(chan struct{})
	go func() { defer close(done); look(4) }()
	<-listing
	if !e.images.has("app:2") || e.images.has("app:3") {
		t.Error("what the last look saw is forgotten during a look")
	}

	close(goOn)
	<-done
}

func TestNobodyThere(t *testing.T) {
	e, err := New(Config{
		Endpoint: "unix://" + filepath.Join(t.TempDir(), "nobody"),
		Log:      slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	if _, err := e.Host(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}

	if _, err := e.PauseImage(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
}

// TestPullThatStalls sends one message and then nothing.
func TestPullThatStalls(t *testing.T) {
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
		t.Errorf("%v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Pull(ctx, "registry.example/app:1", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestWaitsHonourContext: what waits for a list of images, or for the load of the pause image,
// gives up with its ctx.
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
		unlock, err := call.lock.Lock(t.Context(), allKeys)
		if err != nil {
			t.Fatal(err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if err := call.do(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}

		cancel()
		unlock()
	}
}

// TestStalledDescriptions: one container and one image that the engine never describes take the
// others a moment; they are what the lists say, and keep what was known of the image.
func TestStalledDescriptions(t *testing.T) {
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

	hangs.Store(true)
	tag.Store("odd:2")
	begin := time.Now()
	images, err := e.Images(t.Context())
	if err != nil || len(images) != 2 || !images[0].Stale || images[0].User != "7" || !images[0].Named("odd:2") ||
		images[1].Stale {
		t.Errorf("Images: %+v, %v", images, err)
	}

	objects, err := e.Objects(t.Context())
	if err != nil || len(objects) != 2 || string(objects[0].Unread) != odd || objects[1].Sandbox == nil {
		t.Errorf("Objects: %+v, %v", objects, err)
	}

	if d := time.Since(begin); d < 2*stragglerTimeout {
		t.Errorf("it took %s", d)
	}

	hangs.Store(false)
	if images, err := e.Images(t.Context()); err != nil || len(images) != 2 || images[0].Stale {
		t.Errorf("Images after the engine went on: %+v, %v", images, err)
	}
}
