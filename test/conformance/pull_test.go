package conformance

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/moby/client"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/test/registry"

	"cri-dockerd/test/engines"
)

func (n *node) pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (string, error) {
	r, err := n.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, Auth: auth})
	return r.GetImageRef(), err
}

func (n *node) registry(t *testing.T) *registry.Registry {
	t.Helper()
	return registry.Serve(t, n.own(t).Listen(t, "127.0.0.1:0"))
}

// hasContainerdStore reports whether the engine keeps images in containerd's store.
func (n *node) hasContainerdStore(t *testing.T) bool {
	t.Helper()
	info, err := n.own(t).Docker(t).Info(t.Context(), client.InfoOptions{})
	if err != nil {
		t.Fatal(err)
	}

	return slices.ContainsFunc(info.Info.DriverStatus, func(kv [2]string) bool {
		return strings.Contains(kv[1], "io.containerd.snapshotter")
	})
}

// TestPull pulls by tag, by digest and by both. Each call returns the ID of all other calls.
func TestPull(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		ref := r.Add(t, "app", "1", 3, 10000)
		id, err := n.pull(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}

		i := n.imageStatus(t, ref)
		if i.GetId() != id || len(i.RepoDigests) != 1 {
			t.Fatalf("pulled %s, ImageStatus: %v", id, i)
		}

		_, digest, _ := strings.Cut(i.RepoDigests[0], "@")
		for _, again := range []string{r.Host + "/app@" + digest, ref + "@" + digest, ref} {
			if got, err := n.pull(t.Context(), again, nil); err != nil || got != id {
				t.Errorf("%s: %s, %v; want %s", again, got, err, id)
			}
			if got := n.imageStatus(t, again); got.GetId() != id {
				t.Errorf("ImageStatus %s: %v", again, got)
			}
		}
	})
}

// TestPullErrors checks that an error has the code and the text of the registry's error.
func TestPullErrors(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		r.Add(t, "app", "1", 1, 1000)
		for repository, rule := range map[string]registry.Rule{
			"r401": {Status: 401, Code: "UNAUTHORIZED"},
			"r403": {Status: 403, Code: "DENIED"},
			"r429": {Status: 429, Code: "TOOMANYREQUESTS"},
			"r500": {Status: 500, Code: "UNKNOWN"},
			"r503": {Status: 503, Code: "UNAVAILABLE"},
		} {
			r.Set(repository, rule)
		}

		// not on loopback, so the engine requires TLS
		plain := registry.Serve(t, n.own(t).Listen(t, n.own(t).Address(t)+":0"))
		for ref, want := range map[string]codes.Code{
			r.Host + "/app:2":     codes.NotFound,
			r.Host + "/nothing:1": codes.NotFound,
			r.Host + "/app@sha256:" + strings.Repeat("0123456789abcdef", 4): codes.NotFound,
			r.Host + "/r401:1":    codes.PermissionDenied,
			r.Host + "/r403:1":    codes.PermissionDenied,
			r.Host + "/r429:1":    codes.Unavailable,
			r.Host + "/r500:1":    codes.Unavailable,
			r.Host + "/r503:1":    codes.Unavailable,
			"127.0.0.1:1/app:1":   codes.Unavailable,
			plain.Host + "/app:1": codes.Unavailable,
			"":                    codes.InvalidArgument,
			"UPPER:1":             codes.InvalidArgument,
			"a b":                 codes.InvalidArgument,
			"a/../b":              codes.InvalidArgument,
		} {
			t.Run(fmt.Sprintf("%q", ref), func(t *testing.T) {
				if _, err := n.pull(t.Context(), ref, nil); status.Code(err) != want ||
					!strings.Contains(err.Error(), ref) {
					t.Errorf("PullImage: %v, want %s", err, want)
				}
			})
		}
	})
}

// TestPullCredentials uses every field of AuthConfig, with registries for Basic authentication and
// for tokens.
func TestPullCredentials(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		basic, token := n.registry(t), n.registry(t)
		basic.Set("", registry.Rule{User: "user", Password: "pass:word"})
		token.Set("", registry.Rule{
			User:         "user",
			Password:     "pass:word",
			Token:        "the-token",
			RefreshToken: "the-identity",
		})

		good := base64.StdEncoding.EncodeToString([]byte("user:pass:word"))
		for i, c := range []struct {
			r    *registry.Registry
			auth *runtimeapi.AuthConfig
			want codes.Code
		}{
			{basic, nil, codes.PermissionDenied},
			{basic, &runtimeapi.AuthConfig{Username: "user", Password: "wrong"}, codes.PermissionDenied},
			{basic, &runtimeapi.AuthConfig{Username: "user", Password: "pass:word"}, codes.OK},
			{basic, &runtimeapi.AuthConfig{
				Username:      "user",
				Password:      "pass:word",
				ServerAddress: basic.Host,
			}, codes.OK},
			{basic, &runtimeapi.AuthConfig{Auth: good}, codes.OK},
			{basic, &runtimeapi.AuthConfig{Auth: "not base64!"}, codes.InvalidArgument},
			{token, nil, codes.PermissionDenied},
			{token, &runtimeapi.AuthConfig{Username: "user", Password: "wrong"}, codes.PermissionDenied},
			{token, &runtimeapi.AuthConfig{Username: "user", Password: "pass:word"}, codes.OK},
			{token, &runtimeapi.AuthConfig{Auth: good}, codes.OK},
			{token, &runtimeapi.AuthConfig{IdentityToken: "the-identity"}, codes.OK},
			{token, &runtimeapi.AuthConfig{RegistryToken: "the-token"}, codes.OK},
			{token, &runtimeapi.AuthConfig{RegistryToken: "another"}, codes.PermissionDenied},
		} {
			t.Run(fmt.Sprint("row ", i), func(t *testing.T) {
				ref := c.r.Add(t, fmt.Sprintf("app%d", i), "1", 1, 1000)
				if _, err := n.pull(t.Context(), ref, c.auth); status.Code(err) != c.want {
					t.Errorf("pull with %+v: %v, want %s", c.auth, err, c.want)
				}
			})
		}
	})
}

// TestPullDeadline cancels a pull without progress and reports its last phase. It does not cancel a
// pull at 50 KiB/s that takes three times as long.
func TestPullDeadline(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		deadline, size := 2*time.Second, int64(310<<10)
		if n.hasContainerdStore(t) { // it reports progress once per MiB, every 20 s
			deadline, size = 25*time.Second, 3900<<10
		}

		d := n.withDaemon(t, "--image-pull-progress-deadline="+deadline.String())
		r := n.registry(t)
		stalls, slow := r.Add(t, "stalls", "1", 1, 4<<20), r.Add(t, "slow", "1", 1, size)
		r.Set("stalls", registry.Rule{Stall: 2100 << 10})
		r.Set("slow", registry.Rule{Rate: 50 << 10})
		var wg sync.WaitGroup
		wg.Go(func() {
			began := time.Now()
			_, err := d.pull(t.Context(), stalls, nil)
			if took := time.Since(began); status.Code(err) != codes.Unavailable ||
				!strings.Contains(err.Error(), "Downloading") || took < deadline {
				t.Errorf("stalled pull: %v after %v, want Unavailable after the deadline", err, took)
			}
		})

		wg.Go(func() {
			began := time.Now()
			_, err := d.pull(t.Context(), slow, nil)
			if took := time.Since(began); err != nil || took < 3*deadline {
				t.Errorf("slow pull: %v after %v, want success", err, took)
			}
		})

		wg.Wait()
	})
}

// activePull matches the metric of at least one active pull. Other tests may pull as well.
var activePull = regexp.MustCompile(`(?m)^cri_dockerd_image_pulls_active [1-9]`)

// TestParallelPulls pulls one image in parallel. The calls share one download, and a cancelled call
// does not end it for the others.
func TestParallelPulls(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		ref := r.Add(t, "shared", "1", 1, 10000)
		proceed := make(chan struct{})
		r.Set("shared", registry.Rule{BeforeBlob: proceed})
		var wg sync.WaitGroup
		ids := make([]string, 5)
		for i := range ids {
			wg.Go(func() {
				var err error
				if ids[i], err = n.pull(t.Context(), ref, nil); err != nil {
					t.Error(err)
				}
			})
		}

		eventually(t, "pull in the registry", func() bool { return r.Busy("shared") > 0 })
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()

		if page := n.Metrics(t); !activePull.MatchString(page) {
			t.Errorf("metrics lack the active pull:\n%s", page)
		}
		if _, err := n.pull(ctx, ref, nil); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("pull with a short deadline: %v, want DeadlineExceeded", err)
		}

		close(proceed)
		wg.Wait()
		for _, id := range ids {
			if id == "" || id != ids[0] {
				t.Errorf("pulls returned the IDs %v, want one", ids)
			}
		}

		if got := r.Layers("shared"); got != 1 {
			t.Errorf("the layer was fetched %d times, want once", got)
		}
	})
}

// TestCancelledPull cancels a pull and repeats it.
func TestCancelledPull(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		ref := r.Add(t, "cancelled", "1", 1, 1<<20)
		r.Set("cancelled", registry.Rule{Rate: 50 << 10}) // 20.10 notices the cancellation when it receives more data
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := n.pull(ctx, ref, nil); status.Code(err) != codes.Canceled {
				t.Errorf("cancelled pull: %v, want Canceled", err)
			}
		})

		eventually(t, "download of the layer", func() bool { return r.Layers("cancelled") > 0 })
		cancel()
		wg.Wait()
		eventually(t, "end of the download", func() bool { return r.Busy("cancelled") == 0 })
		r.Set("cancelled", registry.Rule{})
		if _, err := n.pull(t.Context(), ref, nil); err != nil {
			t.Errorf("pull after the cancelled one: %v", err)
		}
	})
}

// TestPauseImageOfARegistry pulls an explicit sandbox image with credentials of this machine, from
// config.json or a credential helper. Without them the error suggests a fix.
func TestPauseImageOfARegistry(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		img, err := pause.New("x86_64")
		if err != nil {
			t.Fatal(err)
		}

		i, err := tarball.Image(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(img.Archive)), nil
		}, nil)
		if err == nil {
			// An image different from the embedded one.
			i, err = mutate.Config(i, v1.Config{Entrypoint: []string{"/pause"}, User: "1"})
		}

		if err != nil {
			t.Fatalf("%s: %v", img.Ref, err)
		}

		r := n.registry(t)
		ref := r.Put(t, "pause", "1", i)
		r.Set("", registry.Rule{User: "user", Password: "secret"})
		n = n.withDaemon(t, "--pod-infra-container-image="+ref)
		cfg := n.podConfig(t)
		if _, err := n.Runtime.RunPodSandbox(t.Context(),
			&runtimeapi.RunPodSandboxRequest{Config: cfg}); status.Code(err) != codes.PermissionDenied ||
			!strings.Contains(err.Error(), ref) || !strings.Contains(err.Error(), "docker login") {
			t.Errorf("RunPodSandbox without credentials: %v", err)
		}

		config := filepath.Join(n.own(t).Dir, "root/root/.docker/config.json")
		auth := base64.StdEncoding.EncodeToString([]byte("user:secret"))
		helper := "#!/bin/sh\ncat > /dev/null\necho '{\"ServerURL\":\"" + r.Host +
			"\",\"Username\":\"user\",\"Secret\":\"secret\"}'\n"
		engines.WriteProgram(t, filepath.Join(n.own(t).Dir, "bin/docker-credential-test"), helper)
		for _, content := range []string{
			`{"auths":{"` + r.Host + `":{"auth":"` + auth + `"}}}`,
			`{"credHelpers":{"` + r.Host + `":"test"}}`,
		} {
			if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}

			pod := n.runPod(t, cfg)
			if got := n.imageStatus(t, ref); !got.GetPinned() {
				t.Errorf("sandbox image: %v, want pinned", got)
			}

			n.removePod(t, pod)
			if err := n.removeImage(t, ref); err != nil {
				t.Error(err)
			}
		}

		if err := os.WriteFile(config, []byte(`{"credHelpers":{"`+r.Host+`":"missing"}}`), 0o600); err != nil {
			t.Fatal(err)
		}

		if _, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg}); err == nil ||
			!strings.Contains(err.Error(), "docker-credential-missing") {
			t.Errorf("RunPodSandbox with a missing helper: %v", err)
		}
	})
}

// TestPullTLS pulls from a registry with a private certificate authority. The pull fails with the
// cause until the engine trusts the authority.
func TestPullTLS(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		l := n.own(t).Listen(t, n.own(t).Address(t)+":0")
		r, authority := registry.ServeTLS(t, l)
		ref := r.Add(t, "secure", "1", 1, 1000)
		if _, err := n.pull(t.Context(), ref, nil); status.Code(err) != codes.Unavailable ||
			!strings.Contains(err.Error(), "x509") {
			t.Errorf("pull with an unknown authority: %v", err)
		}

		certs := n.own(t).ConfigFile("/etc/docker/certs.d/" + r.Host)
		if err := os.MkdirAll(certs, 0o755); err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { os.RemoveAll(certs) })
		if err := os.WriteFile(filepath.Join(certs, "ca.crt"), authority, 0o644); err != nil {
			t.Fatal(err)
		}

		if id, err := n.pull(t.Context(), ref, nil); err != nil || n.imageStatus(t, ref).GetId() != id {
			t.Errorf("pull with a trusted authority: %s, %v", id, err)
		}
	})
}

// TestPullCut breaks a connection in the middle of a layer. The pull is Unavailable if the engine
// gives up (29 does at once), and succeeds if the engine retries.
func TestPullCut(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		ref := r.Add(t, "cut", "1", 1, 1<<20)
		r.Set("cut", registry.Rule{Cut: 200 << 10})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := n.pull(t.Context(), ref, nil); err != nil &&
				(status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "EOF")) {
				t.Errorf("interrupted pull: %v, want success or Unavailable", err)
			}
		})

		eventually(t, "download of the layer", func() bool { return r.Layers("cut") > 0 })
		eventually(t, "end of the interrupted connection", func() bool { return r.Busy("cut") == 0 })
		r.Set("cut", registry.Rule{})
		wg.Wait()
		if id, err := n.pull(t.Context(), ref, nil); err != nil || n.imageStatus(t, ref).GetId() != id {
			t.Errorf("pull after the interruption: %v", err)
		}
	})
}
