package stream

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// TLSFiles are the files of a certificate and its key, in PEM.
type TLSFiles struct{ Cert, Key string }

// certificates reloads the server's certificate when its files change.
type certificates struct {
	files TLSFiles
	log   *slog.Logger

	mu      sync.Mutex // guards the fields below
	current *tls.Certificate
	read    [2]time.Time // modification times of the files at the last read
}

// loadTLS reads the files. Without files it returns nil.
func loadTLS(files TLSFiles, log *slog.Logger) (*certificates, error) {
	if files == (TLSFiles{}) {
		return nil, nil
	}

	c := &certificates{files: files, log: log}
	c.read = c.modified()
	cert, err := c.load()
	if err != nil {
		return nil, err
	}

	c.current = cert

	return c, nil
}

// load reads the files.
func (c *certificates) load() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
	if err != nil {
		return nil, fmt.Errorf("--streaming-tls-cert-file, --streaming-tls-key-file: %w", err)
	}
	return &cert, nil
}

// modified returns the modification times of the files.
func (c *certificates) modified() (times [2]time.Time) {
	for i, file := range []string{c.files.Cert, c.files.Key} {
		if st, err := os.Stat(file); err == nil {
			times[i] = st.ModTime()
		}
	}
	return times
}

// get returns the current certificate, reloaded after a change. If the files are unreadable or do
// not match, for example because only one has been replaced so far, get returns the previous
// certificate.
func (c *certificates) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	current, changed := c.update(c.modified())
	if !changed {
		return current, nil
	}

	// without the lock, so that other connections use the previous one meanwhile
	cert, err := c.load()
	if err != nil {
		c.log.Warn("failed to reload the streaming certificate; the previous one remains in use", "err", err)
		return current, nil
	}

	c.log.Info("reloaded the streaming certificate", "file", c.files.Cert)
	c.mu.Lock()
	defer c.mu.Unlock()

	c.current = cert

	return cert, nil
}

// update records the modification times. If changed is true, the caller must reload the files.
func (c *certificates) update(times [2]time.Time) (current *tls.Certificate, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()

	changed = times != c.read
	c.read = times
	return c.current, changed
}

// verifyHost checks whether the certificate is valid for a host name or address.
func (c *certificates) verifyHost(host string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current.Leaf.VerifyHostname(host)
}

func (c *certificates) config() *tls.Config {
	return &tls.Config{
		GetCertificate: c.get,
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
	}
}
