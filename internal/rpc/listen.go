package rpc

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"cri-dockerd/internal/connlimit"
	"cri-dockerd/internal/safefs"
)

// maxCertificates is the maximum size of a certificate file in bytes.
const maxCertificates = 1 << 20

// TLSFiles are the files for mutual TLS. All or none are set.
type TLSFiles struct{ Cert, Key, ClientCA string }

const (
	socketMode  = 0o660
	socketGroup = "docker" // access to Docker's socket is equivalent: either grants root
)

// Listen opens an endpoint: unix:///path or a path, fd:// for the socket from systemd, or
// tcp://host:port. Beyond loopback TCP requires mutual TLS.
func Listen(endpoint string, files TLSFiles) (net.Listener, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint %q: %w", endpoint, err)
	}

	switch u.Scheme {
	case "", "unix":
		if l, err := inheritedAt(u.Path); l != nil || err != nil {
			return l, err
		}
		return ListenUnix("--container-runtime-endpoint", u.Path)

	case "fd":
		return inherited(files)
	case "tcp":
		return listenTCP(u.Host, files)
	}

	return nil, fmt.Errorf("--container-runtime-endpoint %q: use unix:///path, fd:// or tcp://host:port", endpoint)
}

// inherited returns the socket from systemd (sd_listen_fds(3)). The rules for TCP apply to it too.
func inherited(files TLSFiles) (net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint fd://: %w", err)
	}

	for _, l := range all {
		if l == nil {
			continue
		}
		if l.Addr().Network() == "tcp" {
			return secure(l, files)
		}
		return l, nil
	}

	return nil, errors.New("--container-runtime-endpoint fd://: systemd passed no socket; start the service through " +
		"cri-docker.socket, or give unix:///var/run/cri-dockerd.sock")
}

// inheritedAt returns the socket from systemd at path, nil if there is none. Some service units
// have a socket unit and set the path of its socket instead of fd://.
func inheritedAt(path string) (net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint unix://%s: systemd's socket: %w", path, err)
	}

	for _, l := range all {
		if l == nil || l.Addr().Network() != "unix" {
			continue
		}

		inherited, err := os.Stat(l.Addr().String())
		if err != nil {
			continue
		}

		if wanted, err := os.Stat(path); err == nil && os.SameFile(inherited, wanted) { // /var/run is a link to /run
			return l, nil
		}
	}

	return nil, nil
}

// ListenUnix creates a socket for root and the group docker (mode 0660). It replaces the socket of
// a dead daemon, and fails if a server answers on it. Errors name the flag for the path.
func ListenUnix(flag, path string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s %q: the path must be absolute, as in unix:///var/run/cri-dockerd.sock", flag, path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("create the directory of the socket: %w", err)
	}

	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s exists and is not a socket; remove it or choose another %s", path, flag)
		}

		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
		}

		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) { // a busy server is alive, too
			return nil, fmt.Errorf("another server answers on %s; stop it or choose another %s", path, flag)
		}

		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of a dead daemon: %w", err)
		}
	}

	// The umask denies access by others from the start.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}

	if err := share(path); err != nil {
		l.Close()
		return nil, err
	}

	return l, nil
}

// share grants the group docker access to the socket, if the group exists.
func share(path string) error {
	if g, err := user.LookupGroup(socketGroup); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			if err := os.Chown(path, -1, gid); err != nil && !errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("change the group of %s to %s: %w", path, socketGroup, err)
			}
		}
	}

	return os.Chmod(path, socketMode)
}

// listenTCP listens on loopback in plain text, and on other addresses only with certificates on
// both sides: access to the CRI is equivalent to root.
func listenTCP(addr string, files TLSFiles) (net.Listener, error) {
	if err := checkTLS(addr, files); err != nil {
		return nil, err
	}

	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint tcp://%s: %w", addr, err)
	}

	return secure(l, files)
}

// checkTLS rejects an address beyond loopback without certificates.
func checkTLS(addr string, files TLSFiles) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("--container-runtime-endpoint tcp://%s: %w", addr, err)
	}

	ip, err := netip.ParseAddr(host)
	if loopback := host == "localhost" || err == nil && ip.IsLoopback(); !loopback && files == (TLSFiles{}) {
		return fmt.Errorf("--container-runtime-endpoint tcp://%s: mutual TLS is required beyond loopback; set "+
			"--tls-cert-file, --tls-key-file and --tls-client-ca-file", addr)
	}

	return nil
}

// secure adds mutual TLS to a TCP listener if certificates are set. It closes the listener if they
// are missing.
func secure(l net.Listener, files TLSFiles) (net.Listener, error) {
	if err := checkTLS(l.Addr().String(), files); err != nil {
		return nil, errors.Join(err, l.Close())
	}

	if files == (TLSFiles{}) {
		return limited{connlimit.New(l, tcpLimits), nil}, nil
	}

	cfg, err := tlsConfig(files)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}

	return limited{connlimit.New(l, tcpLimits), cfg}, nil
}

// tlsConfig returns the configuration for mutual TLS.
func tlsConfig(files TLSFiles) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert-file, --tls-key-file: %w", err)
	}

	pem, err := safefs.ReadTrusted(files.ClientCA, maxCertificates)
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca-file: %w", err)
	}

	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--tls-client-ca-file %s: the file contains no certificate", files.ClientCA)
	}

	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
	}, nil
}
