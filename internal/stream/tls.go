package stream

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// TLSFiles are the files of a certificate, in PEM.
type TLSFiles struct{ Cert, Key string }

// certificates is a server's certificate, read again when its files change.
type certificates struct {
	files TLSFiles
	log   *slog.Logger

	mu      sync.Mutex // guards the rest
	current *tls.Certificate
	read    [2]time.Time // modification times of the files when they were read
}

// loadTLS reads the files, nil for none.
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

// modified are the times at which the files changed last.
func (c *certificates) modified() (times [2]time.Time) {
	for i, file := range []string{c.files.Cert, c.files.Key} {
		if st, err := os.Stat(file); err == nil {
			times[i] = st.ModTime()
		}
	}
	return times
}

// get returns the certificate of the files as they are now. While they cannot be read, as when only
// one of them has been replaced, it is the earlier one.
func (c *certificates) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	current, changed := c.observe(c.modified())
	if !changed {
		return current, nil
	}

	cert, err := c.load() // without the lock: other connections get the earlier one meanwhile
	if err != nil {
		c.log.Warn("the new streaming certificate cannot be read; the earlier one stays in use", "err", err)
		return current, nil
	}

	c.log.Info("read the streaming certificate again", "file", c.files.Cert)
	c.mu.Lock()
	defer c.mu.Unlock()

	c.current = cert

	return cert, nil
}

// observe notes when the files changed last. changed says that the caller is the first to see it,
// and is to read them.
func (c *certificates) observe(times [2]time.Time) (current *tls.Certificate, changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed = times != c.read
	c.read = times
	return c.current, changed
}

// names reports whether the certificate is good for a host name or address.
func (c *certificates) names(host string) error {
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
