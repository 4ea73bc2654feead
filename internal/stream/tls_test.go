package stream

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// certify writes a self-signed certificate for an address, and returns it in PEM.
func certify(t *testing.T, files TLSFiles, ip net.IP) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{ip},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}

	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}

	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}

	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	writeFile(t, files.Cert, cert)
	writeFile(t, files.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))

	return cert
}

// writeFile writes a file with a new modification time.
func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	when := time.Now()
	if st, err := os.Stat(path); err == nil {
		when = st.ModTime().Add(time.Second)
	}

	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}

	if err := os.Chtimes(path, when, when); err != nil {
		t.Fatal(err)
	}
}

func tlsFiles(t *testing.T) TLSFiles {
	t.Helper()
	dir := t.TempDir()
	return TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
}

// execWS runs a command over a WebSocket and verifies the certificate, as the kubelet does.
func execWS(t *testing.T, s *Server, trusted []byte) (map[byte]string, error) {
	t.Helper()
	u, err := url.Parse(execURL(t, s, false))
	if err != nil || u.Scheme != "https" {
		t.Fatalf("URL %s, %v", u, err)
	}

	u.Scheme = "wss"
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(trusted)
	d := websocket.Dialer{
		Subprotocols:    []string{"v5.channel.k8s.io"},
		TLSClientConfig: &tls.Config{RootCAs: roots},
	}

	c, resp, err := d.DialContext(t.Context(), u.String(), nil)
	if err != nil {
		return nil, err
	}

	resp.Body.Close()
	defer c.Close()

	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))

	return drain(c), nil
}

// TestTLS checks SPDY and WebSocket clients over TLS, and a certificate replaced at run time.
func TestTLS(t *testing.T) {
	files := tlsFiles(t)
	first := certify(t, files, net.IPv4(127, 0, 0, 1))
	s, err := New(Config{Runtime: cat, Dial: dialHost, TLS: files, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	run(t, s)
	checkExec(t, s)
	if got, err := execWS(t, s, first); err != nil || got[2] != "warning" {
		t.Errorf("WebSocket: %q, %v", got, err)
	}

	session, _ := dialSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	data, _, err := connectTo(session, 0, int(echo(t)))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := data.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}

	response := make([]byte, 5)
	if _, err := data.Read(response); err != nil || string(response) != "HELLO" {
		t.Errorf("port-forward: %q, %v", response, err)
	}

	key, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}

	second := certify(t, files, net.IPv4(127, 0, 0, 1))
	newKey, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}

	writeFile(t, files.Key, key) // only the certificate is replaced
	if _, err := execWS(t, s, first); err != nil {
		t.Errorf("with a new certificate and the old key: %v", err)
	}

	writeFile(t, files.Key, newKey)
	if _, err := execWS(t, s, second); err != nil {
		t.Errorf("with the new certificate and key: %v", err)
	}

	if _, err := execWS(t, s, first); err == nil {
		t.Error("the old certificate is still in use")
	}
}

// TestTLSSilentClients checks that clients without a complete handshake are disconnected, and do
// not lock out others.
func TestTLSSilentClients(t *testing.T) {
	files := tlsFiles(t)
	certify(t, files, net.IPv4(127, 0, 0, 1))
	s, err := New(Config{Runtime: cat, TLS: files, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	s.http.ReadHeaderTimeout, s.http.ReadTimeout, s.http.WriteTimeout = shortTimeout, shortTimeout, shortTimeout
	run(t, s)
	before := measure(t)
	var conns []net.Conn
	for i := range 500 {
		c, err := net.Dial("tcp", s.base.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()

		conns = append(conns, c)
		if i%2 == 1 {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = c.Write([]byte{0x16, 3, 1, 0x40, 0})
		}
	}

	checkExec(t, s)
	for _, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(3 * shortTimeout))
		if _, err := c.Read(make([]byte, 1)); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Fatalf("a connection is still open: %v", err)
		}
		c.Close()
	}

	waitForUsage(t, before)
}

// lockedBuffer is a log buffer, safe for concurrent use.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestWarnings checks the warnings about the address and the certificate.
func TestWarnings(t *testing.T) {
	good, wrong := tlsFiles(t), tlsFiles(t)
	certify(t, good, net.IPv4(127, 0, 0, 1))
	certify(t, wrong, net.IPv4(10, 0, 0, 1))
	for name, test := range map[string]struct {
		addr  string
		files TLSFiles
		want  string // "" for no warning
	}{
		"loopback":                       {"", TLSFiles{}, ""},
		"loopback, TLS":                  {"", good, ""},
		"all interfaces":                 {"0.0.0.0", TLSFiles{}, "in plain text"},
		"all interfaces, TLS":            {"0.0.0.0", good, ""},
		"certificate of another address": {"", wrong, "subject alternative names"},
	} {
		t.Run(name, func(t *testing.T) {
			log := &lockedBuffer{}
			s, err := New(Config{
				Addr:    test.addr,
				Runtime: cat,
				TLS:     test.files,
				Log:     slog.New(slog.NewTextHandler(log, nil)),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()

			if text := log.String(); (text == "") != (test.want == "") || !strings.Contains(text, test.want) {
				t.Errorf("log %q, want %q", text, test.want)
			}
		})
	}

	if _, err := New(Config{Runtime: cat, TLS: TLSFiles{good.Cert, wrong.Key}, Log: discard}); err == nil ||
		!strings.Contains(err.Error(), "--streaming-tls-cert-file") {
		t.Errorf("key of another certificate: %v", err)
	}
}
