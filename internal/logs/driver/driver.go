// Package driver implements the log-driver process. It takes containers' output from Docker and
// writes it to the kubelet's log files in the CRI's format.
//
// Docker uses its legacy plugin protocol: HTTP on a unix socket in /run/docker/plugins, and one
// FIFO per container with length-prefixed protobuf messages (moby's
// daemon/logger/internal/logdriver/entry.proto). The engine also holds each FIFO open for reading,
// so unread output waits in the kernel while this process is down.
//
// No line is lost or written twice if the process is killed at any moment. It first copies a batch
// out of the FIFO with tee(2) without consuming it, then writes the batch, and consumes it only
// then. A new process finds each FIFO's log file in its table, and compares the bytes in the FIFO
// with the end of the file.
//
// A stream moves one container's output, independently of the others. The Driver opens and ends
// streams, and serves the protocol.
package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// Name is the driver's name in Docker. The plugin's socket is <Name>.sock.
const Name = "cri-dockerd"

// Socket is the path of the plugin's socket. Docker fixes the directory.
const Socket = "/run/docker/plugins/" + Name + ".sock"

// Options of the driver, as in docker run --log-opt.
const (
	// OptionDirectory is the directory of the log, an absolute path: LogDirectory of the CRI's
	// PodSandboxConfig. The log's path may not leave it.
	OptionDirectory = "directory"
	// OptionPath is the log's relative path in OptionDirectory: LogPath of the CRI's
	// ContainerConfig.
	OptionPath = "path"
)

// FIFODirectory is Docker's directory for the FIFOs of log plugins. Docker fixes it.
const FIFODirectory = "/run/docker/logging"

// Config configures a Driver. Directory and Log are required.
type Config struct {
	// Directory is the directory of the table. It has a small file for each FIFO.
	Directory string
	// FIFOs is the directory of Docker's FIFOs. The default is FIFODirectory.
	FIFOs string
	// Version is reported by Status.
	Version string
	// StallLimit is the timeout of a write. After it the container's output is dropped. The default
	// is 10 s.
	StallLimit time.Duration
	// Pause is the minimum time between two peeks at the FIFO of a slow writer, so that lines
	// gather into batches. The default is 5 ms.
	Pause time.Duration
	// SuccessorTimeout is the time to wait for the successor of an engine after its end. The
	// default is 5 min.
	SuccessorTimeout time.Duration
	Log              *slog.Logger

	// pipeSize, if not 0, is the capacity of all pipes in bytes. It simulates the exhaustion of
	// root's pipe pages for tests, because the kernel exempts a process with CAP_SYS_ADMIN.
	pipeSize int
}

func (c *Config) setDefaults() {
	c.StallLimit = cmp.Or(c.StallLimit, 10*time.Second)
	c.Pause = cmp.Or(c.Pause, 5*time.Millisecond)
	c.SuccessorTimeout = cmp.Or(c.SuccessorTimeout, 5*time.Minute)
	c.FIFOs = cmp.Or(c.FIFOs, FIFODirectory)
}

// Driver writes the logs of all containers. It is safe for concurrent use.
type Driver struct {
	shared
	version string
	parsing chan struct{} // semaphore of concurrently parsed requests
	orphans *orphans
	closing sync.Once
	closed  chan struct{}
	running sync.WaitGroup // goroutines of the streams

	mu      sync.Mutex         // guards streams
	streams map[string]*stream // by the FIFO's path
}

// New reopens the FIFOs of the table and continues the work of an earlier process. It logs and
// skips a FIFO that can no longer be opened. Only an unusable directory is an error.
func New(cfg Config) (*Driver, error) {
	cfg.setDefaults()
	if err := os.MkdirAll(cfg.Directory, 0o700); err != nil {
		return nil, fmt.Errorf("log-driver's table: %w", err)
	}

	poller, err := newPoller()
	if err != nil {
		return nil, err
	}

	m := newMetrics()
	a := newAlarms(cfg.Log, m.alarms)
	d := &Driver{
		shared: shared{
			logger:     cfg.Log,
			metrics:    m,
			alarms:     a,
			poller:     poller,
			buffers:    newPool(a, cfg.pipeSize),
			table:      &table{dir: cfg.Directory, fifos: cfg.FIFOs, logger: cfg.Log, alarms: a},
			stallLimit: cfg.StallLimit,
			pause:      cfg.Pause,
		},
		version: cfg.Version,
		parsing: make(chan struct{}, maxParsing),
		closed:  make(chan struct{}),
		streams: map[string]*stream{},
	}

	d.orphans = newOrphans(d.table, cfg.SuccessorTimeout, d.closed)
	if err := d.resumeAll(); err != nil {
		d.poller.close()
		return nil, err
	}

	return d, nil
}

// resumeAll resumes all streams of the table.
func (d *Driver) resumeAll() error {
	entries, err := d.table.read()
	if err != nil {
		return fmt.Errorf("log-driver's table: %w", err)
	}

	// Keep at least one set of buffers, so that streams continue when descriptors run out.
	first, err := d.buffers.open()
	if err != nil {
		return err
	}

	d.buffers.put(first)

	for _, e := range entries {
		if err := d.resume(e); err != nil {
			d.logger.Warn("cannot resume the output of a container", "container", e.Name, "fifo", e.FIFO,
				"err", err)
		}
	}

	d.running.Go(d.clearAlarms)

	return nil
}

// Close stops reading. Pending output remains in the FIFOs for the next process. Close may be
// called again.
func (d *Driver) Close() {
	d.closing.Do(func() {
		close(d.closed)
		for _, s := range d.all() {
			s.finish()
		}
		d.running.Wait()
		d.poller.close()
		d.buffers.close()
	})
}

// resume resumes a FIFO of the table. If the FIFO is missing, the engine ended while no process was
// listening.
func (d *Driver) resume(e entry) error {
	if !e.Orphaned.IsZero() {
		d.table.removeFIFO(e.FIFO)
		return d.orphans.add(e)
	}

	s, err := openStream(&d.shared, e)
	if errors.Is(err, os.ErrNotExist) {
		return d.orphans.add(e)
	}

	if err != nil {
		return err
	}

	s.lock() // until it is reconciled, so that no request moves output before
	d.run(s, func() {
		defer s.unlock()
		s.reconcileLocked()
	})

	return nil
}

// start starts a container's stream. A FIFO already in use is not an error, because Docker retries
// a request after a lost response.
func (d *Driver) start(ctx context.Context, e entry) error {
	if d.find(e.FIFO) != nil {
		return nil
	}

	d.finishOthers(ctx, e)
	s, err := openStream(&d.shared, e)
	if err != nil {
		return err
	}

	if err := s.takeOver(d.orphans.find(e.Container)); err != nil && !isDiskError(err) {
		s.finish()
		return err
	}

	d.alarms.lower(alarmDescriptors)
	if err := d.table.save(&s.entry); err != nil {
		s.finish()
		return err
	}

	// The orphan's successor is already in the table: this process may be killed at any moment.
	d.orphans.forget(e.Container)
	d.run(s, func() {})

	return nil
}

// finishOthers writes the remaining output of the container's earlier FIFOs. A killed engine leaves
// one behind, and its successor creates another. The last of them becomes the container's orphan.
func (d *Driver) finishOthers(ctx context.Context, e entry) {
	old := slices.DeleteFunc(d.all(), func(s *stream) bool { return s.entry.Container != e.Container })
	slices.SortFunc(old, func(a, b *stream) int { return a.entry.Began.Compare(b.entry.Began) })
	for _, s := range old {
		if d.end(ctx, s, d.abandonLocked) {
			d.drop(s)
		} else {
			d.forget(s)
		}
		d.table.removeFIFO(s.entry.FIFO)
	}
}

// stop writes the remaining output of the FIFO and forgets it. An unknown FIFO is not an error.
func (d *Driver) stop(ctx context.Context, fifo string) {
	s := d.find(fifo)
	if s == nil {
		return
	}
	d.end(ctx, s, (*stream).finishLocked)
	d.forget(s)
	d.orphans.forget(s.entry.Container)
}

// stopTimeout limits the wait for a disk at the end of a container.
const stopTimeout = 20 * time.Second

// end writes the remaining output of a stream's FIFO and finishes the stream, unless the disk does
// not respond.
func (d *Driver) end(ctx context.Context, s *stream, finishLocked func(*stream)) bool {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()

	if err := s.lockFor(ctx); err != nil {
		s.logger.Warn("the disk does not respond; the end of a container's output is not yet written")
		return false
	}
	defer s.unlock()

	s.drainLocked()
	finishLocked(s)

	return true
}

// orphanStream ends a stream after its engine has died.
func (d *Driver) orphanStream(s *stream) {
	s.lock()
	d.abandonLocked(s)
	s.unlock()
	d.table.removeFIFO(s.entry.FIFO)
	d.drop(s) // last: a dropped stream must not be in use
}

// abandonLocked finishes a stream after its engine has died, and keeps its entry for the successor.
// The caller holds the stream's lock.
func (d *Driver) abandonLocked(s *stream) {
	if s.closed {
		return
	}
	s.finishLocked()
	if err := errors.Join(s.spill.remove(), d.orphans.add(s.entry)); err != nil {
		s.logger.Warn("lines may be lost if the engine returns during a log rotation", "err", err)
	}
}

// Reopen opens a new log at a container's path after the kubelet has renamed the old one (CRI
// ReopenContainerLog). Later lines go to the new file. It returns ErrUnknown for a container
// without a stream. On error the old file remains in use.
func (d *Driver) Reopen(ctx context.Context, container string) error {
	container = text.Clean(container, text.MaxName)
	err := ErrUnknown
	if s := d.findContainer(model.ContainerID(container)); s != nil { // only compared with known IDs
		err = s.reopen(ctx)
	}
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", container, err)
	}

	return nil
}

// run registers a stream and runs it after prepare. Streams do not wait for each other, because the
// disk of one may not respond.
func (d *Driver) run(s *stream, prepare func()) {
	d.mu.Lock()
	d.streams[s.entry.FIFO] = s
	d.metrics.streams.Set(float64(len(d.streams)))
	d.mu.Unlock()
	d.running.Go(func() {
		prepare()
		if engineEnded := s.run(); engineEnded {
			d.orphanStream(s)
		}
	})
}

// forget removes a stream and its entry in the table.
func (d *Driver) forget(s *stream) {
	d.drop(s)
	d.table.forget(&s.entry)
}

// drop removes a stream, but not its entry in the table.
func (d *Driver) drop(s *stream) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[s.entry.FIFO] == s {
		delete(d.streams, s.entry.FIFO)
	}
	d.metrics.streams.Set(float64(len(d.streams)))
}

func (d *Driver) find(fifo string) *stream {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.streams[fifo]
}

// all returns the streams in no particular order.
func (d *Driver) all() []*stream {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*stream, 0, len(d.streams))
	for _, s := range d.streams {
		out = append(out, s)
	}
	return out
}

// findContainer returns the newest stream of a container, or nil without one.
func (d *Driver) findContainer(container model.ContainerID) *stream {
	var newest *stream
	for _, s := range d.all() {
		if s.entry.Container == container && (newest == nil || s.entry.Began.After(newest.entry.Began)) {
			newest = s
		}
	}
	return newest
}
