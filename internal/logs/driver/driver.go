// Package driver is the log-driver process: it takes containers' output from Docker and writes it
// to the log files that the kubelet reads, in the CRI's format.
//
// Docker speaks its legacy plugin protocol to it: HTTP on a unix socket in /run/docker/plugins, and
// for each container a FIFO with length-prefixed protobuf messages (moby's
// daemon/logger/internal/logdriver/entry.proto). The engine holds each FIFO open for reading also,
// so output that is not yet read waits in the kernel while this process is down.
//
// Nothing is lost or written twice when the process is killed at any moment. A batch is first
// copied out of the FIFO with tee(2), which leaves it there, then written, and only then consumed.
// A process that starts finds in its table which FIFO belongs to which file, and compares the bytes
// in the FIFO with the end of the file.
//
// A stream moves one container's output and knows nothing of the others. The Driver opens streams,
// ends them, and serves the protocol.
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

// Name is the driver's name in Docker: the plugin's socket is <Name>.sock.
const Name = "cri-dockerd"

// Socket is where Docker looks for the plugin. The directory is fixed in Docker.
const Socket = "/run/docker/plugins/" + Name + ".sock"

// Options of the driver, as docker run --log-opt takes them.
const (
	// OptionDirectory is the directory beneath which the log must stay, an absolute path:
	// LogDirectory of the CRI's PodSandboxConfig.
	OptionDirectory = "directory"
	// OptionPath is the log's path in it: LogPath of the CRI's ContainerConfig.
	OptionPath = "path"
)

// FIFODirectory is where Docker makes the FIFOs of plugins' containers. It is fixed in Docker.
const FIFODirectory = "/run/docker/logging"

// Config is what a Driver needs; Directory and Log are required.
type Config struct {
	// Directory holds the table: a small file for each FIFO.
	Directory string
	// FIFOs is the directory of Docker's FIFOs; FIFODirectory if "".
	FIFOs string
	// Version is reported by Status.
	Version string
	// StallLimit is how long a write may take before the container's output is dropped instead; 10
	// s if 0.
	StallLimit time.Duration
	// Pause is the least time between two peeks at a FIFO whose writer is slow; 5 ms if 0. It makes
	// batches of lines.
	Pause time.Duration
	// EngineAway is how long to wait for the successor of an engine that has ended; 5 min if 0.
	EngineAway time.Duration
	Log        *slog.Logger

	// pipeSize, if not 0, is the capacity of all pipes in bytes, as if root's pipe pages were used
	// up. Tests only: the kernel spares a process that has CAP_SYS_ADMIN.
	pipeSize int
}

func (c *Config) complete() {
	c.StallLimit = cmp.Or(c.StallLimit, 10*time.Second)
	c.Pause = cmp.Or(c.Pause, 5*time.Millisecond)
	c.EngineAway = cmp.Or(c.EngineAway, 5*time.Minute)
	c.FIFOs = cmp.Or(c.FIFOs, FIFODirectory)
}

// Driver writes the logs of all containers. It is safe for concurrent use.
type Driver struct {
	shared
	version string
	parsing chan struct{} // has room for each request that may be parsed at a time
	orphans *orphans
	closing sync.Once
	closed  chan struct{}
	running sync.WaitGroup // of the streams' goroutines

	mu      sync.Mutex         // guards streams
	streams map[string]*stream // by the FIFO's path
}

// New opens the FIFOs of the table again, and goes on where an earlier process ended. A FIFO that
// cannot be opened any more is logged and left out. Only a directory that cannot be used is an
// error.
func New(cfg Config) (*Driver, error) {
	cfg.complete()
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

	d.orphans = newOrphans(d.table, cfg.EngineAway, d.closed)
	if err := d.begin(); err != nil {
		d.poller.close()
		return nil, err
	}

	return d, nil
}

// begin takes up the table.
func (d *Driver) begin() error {
	entries, err := d.table.read()
	if err != nil {
		return fmt.Errorf("log-driver's table: %w", err)
	}

	// one at least, so that streams go on when descriptors are used up
	first, err := d.buffers.open()
	if err != nil {
		return err
	}

	d.buffers.give(first)

	for _, e := range entries {
		if err := d.resume(e); err != nil {
			d.logger.Warn("output of a container is not taken up again", "container", e.Name, "fifo", e.FIFO, "err",
				err)
		}
	}

	d.running.Go(d.tend)

	return nil
}

// Close stops reading. Output that waits in the FIFOs stays there for the next process. It may be
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

// resume takes up a FIFO of the table. A missing one was ended by the engine while no process
// listened.
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

	if err := s.reconcile(); err != nil {
		d.logger.Warn("lines may be written twice to a container's log", "container", e.Name, "err", err)
	}

	d.run(s)

	return nil
}

// start begins to take a container's output. A FIFO that is known already is no error: Docker asks
// again when it got no answer.
func (d *Driver) start(ctx context.Context, e entry) error {
	if d.find(e.FIFO) != nil {
		return nil
	}

	d.finishOthers(ctx, e)
	s, err := openStream(&d.shared, e)
	if err != nil {
		return err
	}

	if err := s.succeed(d.orphans.find(e.Container)); err != nil && !isDiskTrouble(err) {
		s.finish()
		return err
	}

	d.alarms.lower(alarmDescriptors)
	if err := d.table.keep(&s.entry); err != nil {
		s.finish()
		return err
	}

	// The orphan's successor is in the table by now: this process may be killed at any moment.
	d.orphans.forget(e.Container)
	d.run(s)

	return nil
}

// finishOthers writes the output that earlier FIFOs of the container still hold: an engine that was
// killed leaves one, and its successor brings another. The last of them then is the container's
// orphan.
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

// stop writes the output that the FIFO holds and forgets it. An unknown FIFO is no error.
func (d *Driver) stop(ctx context.Context, fifo string) {
	s := d.find(fifo)
	if s == nil {
		return
	}
	d.end(ctx, s, (*stream).finishLocked)
	d.forget(s)
	d.orphans.forget(s.entry.Container)
}

// stopTimeout is how long the end of a container waits for a disk.
const stopTimeout = 20 * time.Second

// end writes the output that a stream's FIFO holds and finishes it, unless the disk does not
// answer.
func (d *Driver) end(ctx context.Context, s *stream, finishLocked func(*stream)) bool {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()

	if err := s.lockFor(ctx); err != nil {
		s.logger.Warn("the end of a container's output is not yet written: the disk does not answer")
		return false
	}
	defer s.unlock()

	s.drainLocked()
	finishLocked(s)

	return true
}

// orphan ends a stream whose engine has ended without a word.
func (d *Driver) orphan(s *stream) {
	s.lock()
	d.abandonLocked(s)
	s.unlock()
	d.table.removeFIFO(s.entry.FIFO)
	d.drop(s) // last: as soon as it is not found, nothing of it is in use
}

// abandonLocked finishes a stream whose engine has ended, and keeps its entry for the successor.
// The stream's lock is held.
func (d *Driver) abandonLocked(s *stream) {
	if s.closed {
		return
	}
	s.finishLocked()
	if err := errors.Join(s.spill.remove(), d.orphans.add(s.entry)); err != nil {
		s.logger.Warn("lines may be lost if the engine comes back while the kubelet rotates the log", "err", err)
	}
}

// Reopen opens the log of a container anew at its path, which the kubelet has renamed before (CRI
// ReopenContainerLog): later lines are written to a new file. ErrUnknown if the container's output
// is not being written. On error the old file is written further.
func (d *Driver) Reopen(ctx context.Context, container string) error {
	container = text.Clean(container, text.MaxName)
	err := ErrUnknown
	if s := d.of(model.ContainerID(container)); s != nil { // only a key of the map
		err = s.reopen(ctx)
	}
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", container, err)
	}

	return nil
}

// run registers a stream and runs it.
func (d *Driver) run(s *stream) {
	d.mu.Lock()
	d.streams[s.entry.FIFO] = s
	d.metrics.streams.Set(float64(len(d.streams)))
	d.mu.Unlock()
	d.running.Go(func() {
		if engineEnded := s.run(); engineEnded {
			d.orphan(s)
		}
	})
}

// forget removes a stream, also from the table.
func (d *Driver) forget(s *stream) {
	d.drop(s)
	d.table.forget(&s.entry)
}

// drop removes a stream and leaves it in the table.
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

// all returns the streams, in no order.
func (d *Driver) all() []*stream {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*stream, 0, len(d.streams))
	for _, s := range d.streams {
		out = append(out, s)
	}
	return out
}

// of returns the stream of a container, the newest if there are two; nil without one.
func (d *Driver) of(container model.ContainerID) *stream {
	var newest *stream
	for _, s := range d.all() {
		if s.entry.Container == container && (newest == nil || s.entry.Began.After(newest.entry.Began)) {
			newest = s
		}
	}
	return newest
}
