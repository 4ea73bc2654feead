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
	// stallTimeout ends a session whose client takes not a byte for this long while there is no
	// room for more output.
	stallTimeout = 30 * time.Second
	// progressInterval is how often a client is checked for that.
	progressInterval = time.Second
	// cutOffTimeout is how long a client that was cut off may take to read why.
	cutOffTimeout = 2 * time.Minute
)

// outputs are the outputs of one session. Output that finds no room waits while the client takes
// some, or, if the session must not wait, ends it: a command that waits is held up alone, but an
// attach holds up the container with its log.
type outputs struct {
	ctx      context.Context // of the session
	conn     *conn
	spools   *spools
	log      *slog.Logger
	mustWait bool
	stall    time.Duration // stallTimeout
	ended    atomic.Bool   // the command has; the rest of its output finds room
	all      []*output
	pumps    sync.WaitGroup
	behind   atomic.Bool
}

// newOutputs returns the outputs of a session. Those with waits hold their writers up when there is
// no room.
func (s *Server) newOutputs(ctx context.Context, c *conn, waits bool) *outputs {
	return &outputs{
		ctx:      ctx,
		conn:     c,
		spools:   s.spools,
		log:      s.log,
		mustWait: waits,
		stall:    s.stall,
	}
}

// add returns a writer for what goes to a stream of the client.
func (s *outputs) add(to io.Writer) io.Writer {
	o := &output{
		to:      to,
		session: s,
		more:    make(chan struct{}, 1),
		room:    make(chan struct{}, 1),
	}

	s.all = append(s.all, o)
	s.pumps.Go(o.pump)

	return o
}

// awaitRoom waits until the client has taken some output. It returns errBehind if it takes none.
func (s *outputs) awaitRoom(o *output) error {
	if !s.mustWait || s.ended.Load() {
		return s.cutOff()
	}

	check := time.NewTicker(min(progressInterval, s.stall))
	defer check.Stop()

	acked, since := s.conn.acked(), time.Now()
	for {
		select {
		case <-o.room:
			return nil
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		case <-check.C:
		}

		if now := s.conn.acked(); now != acked {
			acked, since = now, time.Now()
		} else if time.Since(since) >= s.stall {
			return s.cutOff()
		}
	}
}

// cutOff drops all output, so that the client next reads why.
func (s *outputs) cutOff() error {
	if !s.behind.Swap(true) {
		s.log.Warn("cut off a client that does not read", "client", s.conn.RemoteAddr(), "err", errBehind)
	}
	for _, o := range s.all {
		o.fail(errBehind)
	}
	return errBehind
}

// end lets the rest of a command's output find room (engine.Exec).
func (s *outputs) end() {
	s.ended.Store(true)
	for _, o := range s.all {
		signal(o.room)
	}
}

// flush waits until the client has all output. It returns err, or why the client was cut off.
func (s *outputs) flush(err error) error {
	if s.behind.Load() {
		_ = s.conn.SetWriteDeadline(time.Now().Add(cutOffTimeout))
		err = errBehind
	}

	for _, o := range s.all {
		o.finish()
	}

	s.pumps.Wait()

	return err
}

// drop ends the outputs, and drops what was not sent.
func (s *outputs) drop() {
	for _, o := range s.all {
		o.fail(errEnded)
	}
}

var errEnded = errors.New("the session has ended")
