package engine

import (
	"context"
	"io"
	"sync"
	"time"
)

// writeMonitor detects the exit of a command while a writer blocks. The engine closes the streams
// of a command 2 s after its exit, and output not read by then is lost. Only one writer writes at a
// time.
type writeMonitor struct {
	exec *execution
	ctx  context.Context
	poll *time.Timer

	mu        sync.Mutex // guards the fields below
	writing   bool
	lastAlive time.Time // last time at which the command ran, or at which no writer was blocked
	exited    bool      // OnExit was called
	lossy     bool
}

func newWriteMonitor(ctx context.Context, r *execution) *writeMonitor {
	m := &writeMonitor{exec: r, ctx: ctx}
	m.poll = time.AfterFunc(time.Hour, m.check)
	m.poll.Stop()
	return m
}

// streams returns the streams of the exec with monitored writers.
func (m *writeMonitor) streams() Streams {
	s := m.exec.Streams
	if s.Stdout != nil {
		s.Stdout = monitoredWriter{s.Stdout, m}
	}
	if s.Stderr != nil {
		s.Stderr = monitoredWriter{s.Stderr, m}
	}

	return s
}

type monitoredWriter struct {
	io.Writer
	monitor *writeMonitor
}

// Write implements io.Writer.
func (w monitoredWriter) Write(b []byte) (int, error) {
	w.monitor.begin()
	n, err := w.Writer.Write(b)
	if err == nil {
		w.monitor.end()
	}
	return n, err
}

func (m *writeMonitor) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()

	m.writing, m.lastAlive = true, time.Now()
	m.poll.Reset(m.exec.execs.poll)
}

// end records the end of a write. If the state of the command has been unknown for too long, end
// inspects the command.
func (m *writeMonitor) end() {
	m.mu.Lock()
	m.writing = false
	m.poll.Stop()
	late := time.Since(m.lastAlive) > m.exec.execs.drop && !m.exited
	m.mu.Unlock()
	if !late {
		return
	}

	ctx, cancel := context.WithTimeout(m.ctx, m.exec.execs.drop)
	defer cancel()

	state, err := m.exec.execState(ctx, m.exec.id)
	m.mu.Lock()
	defer m.mu.Unlock()

	m.lossy = m.lossy || err != nil || state.exited
}

// check inspects the command while a writer blocks.
func (m *writeMonitor) check() {
	ctx, cancel := context.WithTimeout(m.ctx, m.exec.execs.drop)
	defer cancel()

	now := time.Now()
	state, err := m.exec.execState(ctx, m.exec.id)

	m.mu.Lock()
	defer m.mu.Unlock()

	switch {
	case m.ctx.Err() != nil || m.exited || !m.writing:
	case err == nil && state.exited:
		m.exited = true
		m.lossy = m.lossy || time.Since(m.lastAlive) > m.exec.execs.drop
		if m.exec.OnExit != nil {
			m.exec.OnExit()
		}

	default:
		if err == nil {
			m.lastAlive = now
		}
		m.poll.Reset(m.exec.execs.poll)
	}
}

// isLossy reports whether the engine may have dropped output.
func (m *writeMonitor) isLossy() bool {
	m.mu.Lock()
	defer m.mu.Unlock()

	m.writing = false
	m.poll.Stop()
	return m.lossy
}
