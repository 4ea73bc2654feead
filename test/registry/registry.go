// Package registry is an image registry in the test's process, with the ways in which registries
// and the networks before them fail.
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
	Host string // address and port, as the first part of an image's name

	scheme string
	store  http.Handler
	mu     sync.Mutex // guards all below
	rules  map[string]Rule
	layer  map[string]bool // by digest
	hits   map[string]int  // of layers, by repository
	busy   map[string]int
}

// Rule is how requests of one repository fail. The zero value lets them through.
type Rule struct {
	Status         int    // of all answers, with Code; 0 for none
	Code           string // the error's code by the distribution specification
	User, Password string // asked for by Basic authentication
	// asked for as a bearer token, given to User and Password (or to whoever sends RefreshToken) by
	// the token server
	Token        string
	RefreshToken string
	Rate         int // of blobs, in bytes per second; 0 for no limit
	Stall        int // bytes of a blob after which nothing more comes; 0 for never
	// bytes of a blob after which the connection is closed; 0 for never
	Cut        int
	BeforeBlob chan struct{} // a blob waits until it is closed
}

// Serve serves a registry on a listener until the test ends.
func Serve(t engines.TB, l net.Listener) *Registry {
	t.Helper()
	return serve(t, l, "http")
}

// ServeTLS serves a registry with TLS and a certificate for the listener's address and these names;
// it returns that of the authority, in PEM.
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

// Add puts an image with random layers of so many bytes each under repository:tag and returns its
// name.
func (r *Registry) Add(t engines.TB, repository, tag string, layers int, size int64) string {
	t.Helper()
	return r.Put(t, repository, tag, Random(t, "amd64", v1.Config{}, layers, size))
}

// Random is an image for an architecture with this configuration and random layers of so many bytes
// each.
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

// Files is an image with these files in each of its layers, by path; "-> target" is a symbolic
// link.
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

// Index is one image for several platforms, by architecture.
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

// Put puts an image or an index under repository:tag and returns its name.
func (r *Registry) Put(t engines.TB, repository, tag string, what remote.Taggable) string {
	t.Helper()
	full := fmt.Sprintf("%s/%s:%s", r.Host, repository, tag)
	ref, err := name.ParseReference(full, name.Insecure)
	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	switch x := what.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, x, remote.WithTransport(direct{r.store}))
	case v1.Image:
		err = remote.Write(ref, x, remote.WithTransport(direct{r.store}))
		r.noteLayers(t, x)
	default:
		t.Fatalf("%T is no image", what)
	}

	if err != nil {
		t.Fatalf("registry: %v", err)
	}

	return full
}

func (r *Registry) noteLayers(t engines.TB, i v1.Image) {
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

// direct sends requests straight to a handler.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Body == nil {
		q = q.Clone(q.Context())
		q.Body = http.NoBody
	}

	a := &answer{header: http.Header{}, status: http.StatusOK}
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

type answer struct {
	header http.Header
	status int
	body   strings.Builder
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }
func (a *answer) WriteHeader(s int)           { a.status = s }

// Set makes requests of a repository fail by a rule; "" stands for all that have none of their own,
// and for the registry itself.
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

// Layers is how often a layer of a repository has been asked for.
func (r *Registry) Layers(repository string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hits[repository]
}

// ServeHTTP answers as a registry, and as its token server beneath /token.
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
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")

	case rule.Token == "" && rule.User != "" && (!basic || user != rule.User || password != rule.Password):
		w.Header().Set("Www-Authenticate", `Basic realm="test"`)
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
	case rule.Status != 0:
		refuse(w, rule.Status, rule.Code)
	case kind == "/blobs/" && q.Method == http.MethodGet:
		r.blob(w, q, repository, rule)
	default:
		r.store.ServeHTTP(w, q)
	}
}

// Busy is how many requests for blobs of a repository are being answered.
func (r *Registry) Busy(repository string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.busy[repository]
}

// blob answers a request for a blob.
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
	if n, _ := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &from); n == 1 { // the store wants to know the end, too
		head := q.Clone(q.Context())
		head.Method = http.MethodHead
		a := &answer{header: http.Header{}}
		r.store.ServeHTTP(a, head)
		size, _ := strconv.ParseInt(a.header.Get("Content-Length"), 10, 64)
		q.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, size-1))
	}

	r.store.ServeHTTP(&slow{ResponseWriter: w, q: q, rule: rule}, q)
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"errors": []map[string]string{{"code": code, "message": strings.ToLower(code) + " says the test"}},
	})
}

// token is the token server (distribution specification, token authentication), by Basic
// authentication or a refresh token.
func (r *Registry) token(w http.ResponseWriter, q *http.Request, repository string) {
	rule := r.rule(repository)
	user, password, _ := q.BasicAuth()
	refresh := q.FormValue("refresh_token")
	if (rule.User == "" || user != rule.User || password != rule.Password) &&
		(rule.RefreshToken == "" || refresh != rule.RefreshToken) {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}

	_ = json.NewEncoder(w).Encode(map[string]string{"token": rule.Token, "access_token": rule.Token})
}

// slow is a blob on a bad line.
type slow struct {
	http.ResponseWriter
	q    *http.Request
	rule Rule
	sent int
}

func (s *slow) Write(b []byte) (n int, err error) {
	const piece = 8 << 10
	for n < len(b) {
		end := min(n+piece, len(b))
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
