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

// maxCertificates bounds a file of certificates, in bytes.
const maxCertificates = 1 << 20

// TLSFiles are the files of mutual TLS; all or none are given.
type TLSFiles struct{ Cert, Key, ClientCA string }

const (
	socketMode  = 0o660
	socketGroup = "docker" // who may use Docker may use this socket: either makes root of a user
)

// Listen opens an endpoint: unix:///path or a path, fd:// for the socket that systemd passes,
// tcp://host:port, which needs mutual TLS beyond loopback.
func Listen(endpoint string, files TLSFiles) (net.Listener, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint %q: %w", endpoint, err)
	}

	switch u.Scheme {
	case "", "unix":
		if l, err := passed(u.Path); l != nil || err != nil {
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

// inherited is the socket that systemd passed (sd_listen_fds(3)). A TCP socket obeys the same rule
// as one of ours.
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

// passed is the socket at path if systemd has it and has passed it, as units do that have a socket
// unit and name the path all the same; else nil.
func passed(path string) (net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint unix://%s: systemd's socket: %w", path, err)
	}

	for _, l := range all {
		if l == nil || l.Addr().Network() != "unix" {
			continue
		}

		given, err := os.Stat(l.Addr().String())
		if err != nil {
			continue
		}

		if wanted, err := os.Stat(path); err == nil && os.SameFile(given, wanted) { // /var/run is a link to /run
			return l, nil
		}
	}

	return nil, nil
}

// ListenUnix makes a socket for root and the group docker (mode 0660). What a dead daemon left is
// replaced; a living one is not. Errors name the flag that chose the path.
func ListenUnix(flag, path string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s %q: the path must be absolute, as in unix:///var/run/cri-dockerd.sock", flag, path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the socket's folder: %w", err)
	}

	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there and is no socket; remove it or choose another %s", path, flag)
		}

		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
		}

		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) { // busy is alive, too
			return nil, fmt.Errorf("another server answers on %s; stop it or choose another %s", path, flag)
		}

		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of a dead daemon: %w", err)
		}
	}

	// Made with no access for others from the start, not tightened afterwards.
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

// share gives the socket to the group docker, if there is one.
func share(path string) error {
	if g, err := user.LookupGroup(socketGroup); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			if err := os.Chown(path, -1, gid); err != nil && !errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("give %s to group %s: %w", path, socketGroup, err)
			}
		}
	}

	return os.Chmod(path, socketMode)
}

// listenTCP listens on loopback in plain text, and elsewhere only with certificates on both sides:
// whoever reaches the CRI is root here.
func listenTCP(addr string, files TLSFiles) (net.Listener, error) {
	if err := permitted(addr, files); err != nil {
		return nil, err
	}

	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint tcp://%s: %w", addr, err)
	}

	return secure(l, files)
}

// permitted refuses an address beyond loopback without certificates.
func permitted(addr string, files TLSFiles) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("--container-runtime-endpoint tcp://%s: %w", addr, err)
	}

	ip, err := netip.ParseAddr(host)
	if loopback := host == "localhost" || err == nil && ip.IsLoopback(); !loopback && files == (TLSFiles{}) {
		return fmt.Errorf("--container-runtime-endpoint tcp://%s: beyond loopback mutual TLS is needed; give "+
			"--tls-cert-file, --tls-key-file and --tls-client-ca-file", addr)
	}

	return nil
}

// secure puts mutual TLS on a TCP listener if certificates are given, and closes one that must not
// be open without.
func secure(l net.Listener, files TLSFiles) (net.Listener, error) {
	if err := permitted(l.Addr().String(), files); err != nil {
		return nil, errors.Join(err, l.Close())
	}

	if files == (TLSFiles{}) {
		return limited{connlimit.New(l, tcpLimits), nil}, nil
	}

	cfg, err := mutual(files)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}

	return limited{connlimit.New(l, tcpLimits), cfg}, nil
}

func mutual(files TLSFiles) (*tls.Config, error) {
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
		return nil, fmt.Errorf("--tls-client-ca-file %s: no certificate in it", files.ClientCA)
	}

	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
	}, nil
}
