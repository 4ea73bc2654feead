package rpc

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestUnixSocket(t *testing.T) {
	for _, prefix := range []string{"unix://", ""} {
		file := filepath.Join(t.TempDir(), "run", "cri.sock")
		l, err := Listen(prefix+file, TLSFiles{})
		if err != nil {
			t.Fatal(err)
		}

		st, err := os.Stat(file)
		if err != nil || st.Mode().Perm() != 0o660 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}

		if _, err := Listen(prefix+file, TLSFiles{}); err == nil ||
			!strings.Contains(err.Error(), "--container-runtime-endpoint") {
			t.Errorf("second daemon on the same socket: %v", err)
		}

		l.Close()
		if _, err := os.Lstat(file); !os.IsNotExist(err) {
			t.Errorf("the socket exists after Close: %v", err)
		}
	}
}

func TestReplaceStaleSocket(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cri.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: file, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}

	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err := Listen("unix://"+file, TLSFiles{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	c, err := net.Dial("unix", file)
	if err != nil {
		t.Fatal(err)
	}

	c.Close()
}

// inheritEnv makes the test program serve one client at the endpoint in its value.
const inheritEnv = "TEST_INHERIT"

// sendHello accepts one client and sends a greeting.
func sendHello(endpoint string) {
	l, err := Listen(endpoint, TLSFiles{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}

	c, err := l.Accept()
	if err == nil {
		_, err = io.WriteString(c, "hello")
	}

	if err = errors.Join(err, c.Close(), l.Close()); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// TestInheritedSocket checks that systemd's socket is used for fd:// and for its path, also through
// a link, and that it remains for the next process. A socket for another path is not used.
func TestInheritedSocket(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(dir, "cri.sock")
	held, err := net.ListenUnix("unix", &net.UnixAddr{Name: file, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()

	passed, err := held.File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()

	tests := map[string]string{
		"fd://":                                file,
		"unix://" + file:                       file,
		filepath.Join(dir, "link", "cri.sock"): file,
		"unix://" + filepath.Join(dir, "other.sock"): filepath.Join(dir, "other.sock"),
	}

	for endpoint, path := range tests {
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
		cmd.Env = append(os.Environ(), inheritEnv+"="+endpoint, "LISTEN_FDS=1")
		cmd.ExtraFiles = []*os.File{passed}
		output := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = output, output
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}

		if got := readHello(t, path); got != "hello" {
			t.Errorf("%s: %q", endpoint, got)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v: %s", endpoint, err, output)
		}

		if _, err := os.Lstat(file); err != nil {
			t.Errorf("%s: systemd's socket: %v", endpoint, err)
		}
	}
}

// readHello waits for a server at path and reads its greeting.
func readHello(t *testing.T, path string) string {
	t.Helper()
	for deadline, tick := time.Now().Add(20*time.Second), time.NewTicker(5*time.Millisecond); ; <-tick.C {
		c, err := net.Dial("unix", path)
		if err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}

		if err != nil {
			continue
		}
		defer c.Close()

		if err := c.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}

		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}

		return string(b)
	}
}

func TestKeepOtherFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	if _, err := Listen("unix://"+file, TLSFiles{}); err == nil {
		t.Error("the endpoint replaced a file")
	}

	if b, err := os.ReadFile(file); err != nil || string(b) != "x" {
		t.Errorf("the file is %q, %v", b, err)
	}
}

func TestInvalidEndpoints(t *testing.T) {
	tests := map[string]string{
		"tcp://0.0.0.0:0":       "--tls-client-ca-file",
		"tcp://:0":              "--tls-client-ca-file",
		"tcp://[::]:0":          "--tls-client-ca-file",
		"tcp://192.0.2.1:0":     "--tls-client-ca-file",
		"fd://":                 "cri-docker.socket",
		"npipe:////./pipe/x":    "unix:///",
		"relative/path":         "absolute",
		"unix://" + t.TempDir(): "is not a socket",
	}

	for endpoint, want := range tests {
		t.Run(endpoint, func(t *testing.T) {
			l, err := Listen(endpoint, TLSFiles{})
			if err == nil {
				l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %q in it", err, want)
			}
		})
	}
}

func TestLoopbackWithoutCertificates(t *testing.T) {
	l, err := Listen("tcp://127.0.0.1:0", TLSFiles{})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// newCertificate writes a self-signed certificate for authority, server and client and returns its
// files.
func newCertificate(t *testing.T) (TLSFiles, tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}

	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}

	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	files := TLSFiles{
		Cert:     filepath.Join(dir, "cert"),
		Key:      filepath.Join(dir, "key"),
		ClientCA: filepath.Join(dir, "cert"),
	}

	for name, block := range map[string]*pem.Block{
		files.Cert: {Type: "CERTIFICATE", Bytes: der},
		files.Key:  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	return files, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestMutualTLS(t *testing.T) {
	files, client := newCertificate(t)
	l, err := Listen("tcp://0.0.0.0:0", files)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	ended := make(chan struct{})
	go func() {
		defer close(ended)

		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("hello")) //nolint:errcheck // fails for a client without a certificate
			c.Close()
		}
	}()

	_, port, _ := net.SplitHostPort(l.Addr().String())
	tests := map[string]struct {
		certs []tls.Certificate
		ok    bool
	}{
		"with certificate":    {[]tls.Certificate{client}, true},
		"without certificate": {nil, false},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{
				InsecureSkipVerify: true, //nolint:gosec // this test does not verify the server
				Certificates:       test.certs,
				NextProtos:         []string{"h2"},
			})
			if err == nil {
				_, err = c.Read(make([]byte, 5)) // TLS 1.3 reports a rejection with the first read
				c.Close()
			}

			if (err == nil) != test.ok {
				t.Errorf("error %v", err)
			}
		})
	}

	l.Close()
	<-ended
}

func TestBrokenCertificates(t *testing.T) {
	files, _ := newCertificate(t)
	for flag, broken := range map[string]TLSFiles{
		"--tls-cert-file":      {Cert: "/nonexistent", Key: files.Key, ClientCA: files.ClientCA},
		"--tls-client-ca-file": {Cert: files.Cert, Key: files.Key, ClientCA: files.Key},
	} {
		t.Run(flag, func(t *testing.T) {
			if _, err := Listen("tcp://127.0.0.1:0", broken); err == nil || !strings.Contains(err.Error(), flag) {
				t.Errorf("error %v, want one with the flag", err)
			}
		})
	}
}
