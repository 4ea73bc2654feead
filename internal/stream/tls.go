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
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read = c.modified()
	if err := c.loadLocked(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *certificates) loadLocked() error {
	cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
	if err != nil {
		return fmt.Errorf("--streaming-tls-cert-file, --streaming-tls-key-file: %w", err)
	}
	c.current = &cert
	return nil
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

// get returns the certificate of the files as they are now. While they cannot be read, as when only one of them has been replaced, it is the
// earlier one.
func (c *certificates) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	now := c.modified()
	c.mu.Lock()
	defer c.mu.Unlock()
	if now != c.read {
		c.read = now
		if err := c.loadLocked(); err != nil {
			c.log.Warn("the new streaming certificate cannot be read; the earlier one stays in use", "err", err)
		} else {
			c.log.Info("read the streaming certificate again", "file", c.files.Cert)
		}
	}
	return c.current, nil
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
