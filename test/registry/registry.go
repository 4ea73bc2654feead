// Package registry is an image registry in the test process. It simulates failures of registries
// and networks.
package registry

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"cri-dockerd/test/engines"
)

// Registry serves images. It is safe for concurrent use.
type Registry struct {
	Host string // address and port, the first part of image names

	scheme string
	store  http.Handler
	mu     sync.Mutex // guards the following fields
	rules  map[string]Rule
	layer  map[string]bool // by digest
	hits   map[string]int  // requests for layers by repository
	busy   map[string]int  // running requests for blobs by repository
}

// Rule defines the failures of requests for a repository. The zero value serves them normally.
type Rule struct {
	Status         int    // of all responses, with Code; 0 for none
	Code           string // error code of the distribution specification
	User, Password string // for Basic authentication
	// bearer token; the token server exchanges User and Password, or RefreshToken, for it
	Token        string
	RefreshToken string
	Rate         int // of blobs, in bytes per second; 0 for no limit
	Stall        int // stop sending after this number of bytes of a blob; 0 for never
	// close the connection after this number of bytes of a blob; 0 for never
	Cut        int
	BeforeBlob chan struct{} // blobs wait until it is closed
}

// Serve serves a registry on a listener until the test ends.
func Serve(t engines.TB, l net.Listener) *Registry {
	t.Helper()
	return serve(t, l, "http")
}

// ServeTLS serves a registry with TLS until the test ends. Its certificate is valid for the
// listener's address and for names. It returns the certificate of the authority in PEM.
func ServeTLS(t engines.TB, l net.Listener, names ...string) (*Registry, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "registry"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{l.Addr().(*net.TCPAddr).IP},
		DNSNames:              names,
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}

	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	r := serve(t, tls.NewListener(l, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}), "https")

	return r, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func serve(t engines.TB, l net.Listener, scheme string) *Registry {
	t.Helper()
	quiet := slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	r := &Registry{
		Host:   l.Addr().String(),
		scheme: scheme,
		store:  registry.New(registry.Logger(quiet)),
		rules:  map[string]Rule{},
		layer:  map[string]bool{},
		hits:   map[string]int{},
		busy:   map[string]int{},
	}

	srv := &http.Server{Handler: r, ErrorLog: quiet}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	return r
}

// Add stores an image with random layers of size bytes each under repository:tag and returns its
// name.
func (r *Registry) Add(t engines.TB, repository, tag string, layers int, size int64) string {
	t.Helper()
	return r.Put(t, repository, tag, Random(t, "amd64", v1.Config{}, layers, size))
}

// Random returns an image for an architecture with this configuration and random layers of size
// bytes each.
func Random(t engines.TB, arch string, config v1.Config, layers int, size int64) v1.Image {
	t.Helper()
	i, err := random.Image(size, int64(layers))
	if err == nil {
		var cfg *v1.ConfigFile
		if cfg, err = i.ConfigFile(); err == nil {
			cfg = cfg.DeepCopy()
			cfg.OS, cfg.Architecture, cfg.Config = "linux", arch, config
			i, err = mutate.ConfigFile(i, cfg)
		}
	}

	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	return i
}

// Files returns an image with these files in its layers, by path. The content "-> target" is a
// symbolic link.
func Files(t engines.TB, layers ...map[string]string) v1.Image {
	t.Helper()
	i := Random(t, "amd64", v1.Config{}, 0, 0)
	for _, files := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, name := range slices.Sorted(maps.Keys(files)) {
			h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[name]))}
			if to, ok := strings.CutPrefix(files[name], "-> "); ok {
				h = &tar.Header{Name: name, Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: to}
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatalf("registry: %v", err)
			}

			if h.Size > 0 {
				if _, err := io.WriteString(w, files[name]); err != nil {
					t.Fatalf("registry: %v", err)
				}
			}
		}

		if err := w.Close(); err != nil {
			t.Fatalf("registry: %v", err)
		}

		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b.Bytes())), nil
		})
		if err == nil {
			i, err = mutate.AppendLayers(i, l)
		}

		if err != nil {
			t.Fatalf("registry: %v", err)
		}
	}

	return i
}

// Index returns a multi-platform index of images by architecture.
func Index(t engines.TB, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	var index v1.ImageIndex = empty.Index
	for _, arch := range slices.Sorted(maps.Keys(images)) {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: images[arch], Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}

	return index
}

// Put stores an image or an index under repository:tag and returns its name.
func (r *Registry) Put(t engines.TB, repository, tag string, content remote.Taggable) string {
	t.Helper()
	full := fmt.Sprintf("%s/%s:%s", r.Host, repository, tag)
	ref, err := name.ParseReference(full, name.Insecure)
	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	switch x := content.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, x, remote.WithTransport(direct{r.store}))
	case v1.Image:
		err = remote.Write(ref, x, remote.WithTransport(direct{r.store}))
		r.recordLayers(t, x)
	default:
		t.Fatalf("%T is not an image", content)
	}

	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	return full
}

// recordLayers records the digests of an image's layers, to count requests for them.
func (r *Registry) recordLayers(t engines.TB, i v1.Image) {
	t.Helper()
	m, err := i.Manifest()
	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()

	for _, l := range m.Layers {
		r.layer[l.Digest.String()] = true
	}
}

// direct sends requests to a handler without a network (http.RoundTripper).
type direct struct{ h http.Handler }

func (d direct) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Body == nil {
		q = q.Clone(q.Context())
		q.Body = http.NoBody
	}

	a := &response{header: http.Header{}, status: http.StatusOK}
	d.h.ServeHTTP(a, q)

	return &http.Response{
		StatusCode: a.status,
		Header:     a.header,
		Body:       io.NopCloser(strings.NewReader(a.body.String())),
		Request:    q,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
	}, nil
}

// response is a response in memory (http.ResponseWriter).
type response struct {
	header http.Header
	status int
	body   strings.Builder
}

func (a *response) Header() http.Header         { return a.header }
func (a *response) Write(b []byte) (int, error) { return a.body.Write(b) }
func (a *response) WriteHeader(s int)           { a.status = s }

// Set sets the rule of a repository. The rule of "" applies to repositories without a rule and to
// the registry itself.
func (r *Registry) Set(repository string, rule Rule) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rules[repository] = rule
}

func (r *Registry) rule(repository string) Rule {
	r.mu.Lock()
	defer r.mu.Unlock()
	if rule, ok := r.rules[repository]; ok {
		return rule
	}
	return r.rules[""]
}

// Layers returns the number of requests for layers of a repository.
func (r *Registry) Layers(repository string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hits[repository]
}

// ServeHTTP serves the registry and, below /token, its token server.
func (r *Registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if repository, ok := strings.CutPrefix(q.URL.Path, "/token/"); ok {
		r.token(w, q, repository)
		return
	}

	repository, kind, digest := "", "", ""
	for _, k := range []string{"/manifests/", "/blobs/"} {
		if before, after, ok := strings.Cut(strings.TrimPrefix(q.URL.Path, "/v2/"), k); ok {
			repository, kind, digest = before, k, after
		}
	}

	rule := r.rule(repository)
	r.mu.Lock()
	if q.Method == http.MethodGet && r.layer[digest] {
		r.hits[repository]++
	}

	r.mu.Unlock()
	user, password, basic := q.BasicAuth()
	switch {
	case rule.Token != "" && q.Header.Get("Authorization") != "Bearer "+rule.Token:
		w.Header().Set("Www-Authenticate",
			fmt.Sprintf(`Bearer realm="%s://%s/token/%s",service="test",scope="repository:%s:pull"`, r.scheme, r.Host,
				repository, repository))
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED")

	case rule.Token == "" && rule.User != "" && (!basic || user != rule.User || password != rule.Password):
		w.Header().Set("Www-Authenticate", `Basic realm="test"`)
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED")
	case rule.Status != 0:
		writeError(w, rule.Status, rule.Code)
	case kind == "/blobs/" && q.Method == http.MethodGet:
		r.blob(w, q, repository, rule)
	default:
		r.store.ServeHTTP(w, q)
	}
}

// Busy returns the number of running requests for blobs of a repository.
func (r *Registry) Busy(repository string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.busy[repository]
}

// blob serves a request for a blob.
func (r *Registry) blob(w http.ResponseWriter, q *http.Request, repository string, rule Rule) {
	count := func(n int) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.busy[repository] += n
	}

	count(1)
	defer count(-1)

	if rule.BeforeBlob != nil {
		select {
		case <-rule.BeforeBlob:
		case <-q.Context().Done():
			return
		}
	}

	var from int64
	// the store requires the end of a range
	if n, _ := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &from); n == 1 {
		head := q.Clone(q.Context())
		head.Method = http.MethodHead
		a := &response{header: http.Header{}}
		r.store.ServeHTTP(a, head)
		size, _ := strconv.ParseInt(a.header.Get("Content-Length"), 10, 64)
		q.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, size-1))
	}

	r.store.ServeHTTP(&slow{ResponseWriter: w, q: q, rule: rule}, q)
}

// writeError writes an error response of the distribution specification.
func writeError(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"errors": []map[string]string{{"code": code, "message": strings.ToLower(code) + " (test)"}},
	})
}

// token serves requests to the token server (distribution specification, token authentication),
// with Basic authentication or a refresh token.
func (r *Registry) token(w http.ResponseWriter, q *http.Request, repository string) {
	rule := r.rule(repository)
	user, password, _ := q.BasicAuth()
	refresh := q.FormValue("refresh_token")
	if (rule.User == "" || user != rule.User || password != rule.Password) &&
		(rule.RefreshToken == "" || refresh != rule.RefreshToken) {
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}

	_ = json.NewEncoder(w).Encode(map[string]string{"token": rule.Token, "access_token": rule.Token})
}

// slow writes a blob according to Rate, Stall and Cut of a rule.
type slow struct {
	http.ResponseWriter
	q    *http.Request
	rule Rule
	sent int
}

func (s *slow) Write(b []byte) (n int, err error) {
	const chunk = 8 << 10
	for n < len(b) {
		end := min(n+chunk, len(b))
		if s.rule.Cut > 0 && s.sent >= s.rule.Cut {
			panic(http.ErrAbortHandler)
		}

		if s.rule.Stall > 0 && s.sent >= s.rule.Stall {
			<-s.q.Context().Done()
			return n, s.q.Context().Err()
		}

		if s.rule.Rate > 0 {
			t := time.NewTimer(time.Duration(end-n) * time.Second / time.Duration(s.rule.Rate))
			select {
			case <-t.C:
			case <-s.q.Context().Done():
				t.Stop()
				return n, s.q.Context().Err()
			}
		}

		k, err := s.ResponseWriter.Write(b[n:end])
		n, s.sent = n+k, s.sent+k
		if err != nil {
			return n, err
		}

		if s.rule != (Rule{}) {
			_ = http.NewResponseController(s.ResponseWriter).Flush()
		}
	}

	return n, nil
}
