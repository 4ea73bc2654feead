package stream

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// stallTimeout ends a session if its buffer is full and the client has not read a byte for this
	// long.
	stallTimeout = 30 * time.Second
	// progressInterval is the interval of checks for the client's progress.
	progressInterval = time.Second
	// disconnectTimeout bounds the time for a disconnected client to read the reason.
	disconnectTimeout = 2 * time.Minute
)

// outputs are the outputs of one session. When the buffers are full, a session either blocks its
// writers or ends. Blocking an exec delays only its command. Blocking an attach would delay the
// container and its log.
type outputs struct {
	ctx     context.Context // of the session
	conn    *conn
	spools  *spools
	log     *slog.Logger
	blocks  bool          // block writers when the buffers are full
	stall   time.Duration // stallTimeout
	exited  atomic.Bool   // the command has exited, and its remaining output must be accepted
	all     []*output
	pumps   sync.WaitGroup
	tooSlow atomic.Bool // the client was disconnected
}

// newOutputs returns the outputs of a session. If blocks is true, they block their writers while
// the buffers are full.
func (s *Server) newOutputs(ctx context.Context, c *conn, blocks bool) *outputs {
	return &outputs{
		ctx:    ctx,
		conn:   c,
		spools: s.spools,
		log:    s.log,
		blocks: blocks,
		stall:  s.stall,
	}
}

// add returns a buffered writer for a stream of the client.
func (s *outputs) add(to io.Writer) io.Writer {
	o := &output{
		to:      to,
		session: s,
		more:    make(chan struct{}, 1),
		space:   make(chan struct{}, 1),
	}

	s.all = append(s.all, o)
	s.pumps.Go(o.pump)

	return o
}

// waitForSpace waits until the client has read some output. Without progress it returns
// errClientTooSlow. exited is the state in which there was no space: a later exit adds some.
func (s *outputs) waitForSpace(o *output, exited bool) error {
	if s.exited.Load() != exited {
		return nil
	}
	if !s.blocks || exited {
		return s.disconnect()
	}

	check := time.NewTicker(min(progressInterval, s.stall))
	defer check.Stop()

	acked, since := s.conn.acked(), time.Now()
	for {
		select {
		case <-o.space:
			return nil
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		case <-check.C:
		}

		if now := s.conn.acked(); now != acked {
			acked, since = now, time.Now()
		} else if time.Since(since) >= s.stall {
			return s.disconnect()
		}
	}
}

// disconnect discards all buffered output, so that the client next reads the reason.
func (s *outputs) disconnect() error {
	if !s.tooSlow.Swap(true) {
		s.log.Warn("disconnecting a client that does not read its output", "client", s.conn.RemoteAddr(),
			"err", errClientTooSlow)
	}
	for _, o := range s.all {
		o.fail(errClientTooSlow)
	}
	return errClientTooSlow
}

// commandExited makes the outputs accept all remaining output (see engine.Exec).
func (s *outputs) commandExited() {
	s.exited.Store(true)
	for _, o := range s.all {
		signal(o.space)
	}
}

// flush waits until all output is sent. It returns err, or the reason for a disconnect.
func (s *outputs) flush(err error) error {
	if s.tooSlow.Load() {
		_ = s.conn.SetWriteDeadline(time.Now().Add(disconnectTimeout))
		err = errClientTooSlow
	}

	for _, o := range s.all {
		o.finish()
	}

	s.pumps.Wait()

	return err
}

// discard closes the outputs and discards unsent data.
func (s *outputs) discard() {
	for _, o := range s.all {
		o.fail(errSessionClosed)
	}
}

var errSessionClosed = errors.New("session is closed")
