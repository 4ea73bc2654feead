package daemon

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/stream"
)

func (p *parts) openStreams() (err error) {
	p.streams, err = stream.New(stream.Config{
		Addr:    p.cfg.StreamingAddr,
		Runtime: streamRuntime{p},
		Dial:    podnet.Dial,
		TLS:     stream.TLSFiles{Cert: p.cfg.StreamingTLSCert, Key: p.cfg.StreamingTLSKey},
		Spool:   func() (*os.File, error) { return openTemporary(p.cfg.RootDirectory) },
		Log:     p.log,
	})
	if err != nil {
		return err
	}

	p.closeLater("streaming server", p.streams)

	return nil
}

// openTemporary creates an unnamed temporary file in dir (O_TMPFILE, open(2)).
func openTemporary(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
}

// streamRuntime connects the streaming server to the service. The service depends on the server, so
// the server needs this indirection. Requests have the IDs from the service's URLs.
type streamRuntime struct{ p *parts }

func (s streamRuntime) Exec(ctx context.Context, id string, x engine.Exec) (int, error) {
	ctx, stop := s.p.service.WhileRunning(ctx, id)
	defer stop()

	c, err := s.p.view.Container(id)
	if err != nil {
		return 0, err
	}

	x.Output = c.ExecOutput

	return s.p.engine.Exec(ctx, c.ID, x)
}

func (s streamRuntime) Attach(ctx context.Context, id string, x engine.Streams) error {
	ctx, stop := s.p.service.WhileRunning(ctx, id)
	defer stop()

	c, err := s.p.view.Container(id)
	if err != nil {
		return err
	}

	return s.p.engine.Attach(ctx, c.ID, c.StdinOnce, x)
}

func (s streamRuntime) OpenNetNS(sandboxID string) (*os.File, error) {
	return s.p.service.OpenNetNS(sandboxID)
}
