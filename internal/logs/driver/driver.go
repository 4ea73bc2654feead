// Package driver is the log-driver process: it takes containers' output from Docker and writes it to the log files that the kubelet reads,
// in the CRI's format.
//
// Docker speaks its legacy plugin protocol to it: HTTP on a unix socket in /run/docker/plugins, and for each container a FIFO with
// length-prefixed protobuf messages (moby's daemon/logger/internal/logdriver/entry.proto). The engine holds each FIFO open for reading
// also, so what is not yet read waits in the kernel while this process is away.
//
// Nothing is lost or written twice when the process is killed at any moment. A batch is first copied out of the FIFO with tee(2), which
// leaves it there, then written, and only then consumed. A process that starts finds in its table which FIFO belongs to which file, and
// compares what waits in the FIFO with the end of the file.
package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cri-dockerd/internal/model"
)

// Name is the driver's name in Docker: the plugin's socket is <Name>.sock.
const Name = "cri-dockerd"

// Socket is where Docker looks for the plugin. The directory is fixed in Docker.
const Socket = "/run/docker/plugins/" + Name + ".sock"

// Options of the driver, as docker run --log-opt takes them.
const (
	// OptionDirectory is the directory beneath which the log must stay, an absolute path: LogDirectory of the CRI's PodSandboxConfig.
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
	// Version is told by Status.
	Version string
	// StallLimit is how long a write may take before the container's output is dropped instead; 10 s if 0.
	StallLimit time.Duration
	// Pause is the least time between two looks at a FIFO whose writer is not in a hurry; 5 ms if 0. It makes batches of lines.
	Pause time.Duration
	// EngineAway is how long a successor of an engine that has gone is waited for; 5 min if 0.
	EngineAway time.Duration
	Log        *slog.Logger

	// pipeSize, if not 0, is the capacity of all pipes in bytes, as if root's pipe pages were used up.
	// Tests only: the kernel spares whoever has CAP_SYS_ADMIN.
	pipeSize int
}

// Driver writes the logs of all containers. It is safe for concurrent use.
type Driver struct {
	cfg     Config
	metrics *metrics
	alarms  *alarms
	poller  *poller
	scratch chan *scratch
	parsing chan struct{} // has room for each request that may be parsed at a time
	closing sync.Once
	closed  chan struct{}
	left    atomic.Pointer[time.Time] // when a daemon that watched this process has last gone; nil before

	mu      sync.Mutex                  // guards all below
	streams map[string]*stream          // by the FIFO's path
	orphans map[model.ContainerID]entry // by container; each is in the table, with the time since when
	running sync.WaitGroup              // of the streams' goroutines
}

// New opens again what the table holds, and goes on where an earlier process ended. A FIFO that cannot be opened any more is left out with
// a line in the log; only a directory that cannot be used is an error.
func New(cfg Config) (*Driver, error) {
	cfg.StallLimit, cfg.Pause = cmp.Or(cfg.StallLimit, 10*time.Second), cmp.Or(cfg.Pause, 5*time.Millisecond)
	cfg.EngineAway, cfg.FIFOs = cmp.Or(cfg.EngineAway, 5*time.Minute), cmp.Or(cfg.FIFOs, FIFODirectory)
	if err := os.MkdirAll(cfg.Directory, 0o700); err != nil {
		return nil, fmt.Errorf("log-driver's table: %w", err)
	}
	poller, err := newPoller()
	if err != nil {
		return nil, err
	}
	m := newMetrics()
	d := &Driver{
		cfg:     cfg,
		metrics: m,
		alarms:  newAlarms(cfg.Log, m.alarms),
		poller:  poller,
		scratch: make(chan *scratch, idleScratch),
		parsing: make(chan struct{}, maxParsing),
		closed:  make(chan struct{}),
		streams: map[string]*stream{},
		orphans: map[model.ContainerID]entry{},
	}
	if err := d.begin(); err != nil {
		d.poller.close()
		return nil, err
	}
	return d, nil
}

// begin takes up the table.
func (d *Driver) begin() error {
	entries, err := d.readTable()
	if err != nil {
		return fmt.Errorf("log-driver's table: %w", err)
	}
	first, err := d.openScratch() // one at least, so that what runs goes on when descriptors are used up
	if err != nil {
		return err
	}
	d.giveScratch(first)

	for _, e := range entries {
		if err := d.resume(e); err != nil {
			d.cfg.Log.Warn("output of a container is not taken up again", "container", e.Name, "fifo", e.FIFO, "err", err)
		}
	}
	d.running.Go(d.tend)
	return nil
}

// Close stops reading. What waits in the FIFOs stays there for the next process. It may be called again.
func (d *Driver) Close() { d.closing.Do(d.close) }

func (d *Driver) close() {
	close(d.closed)
	d.mu.Lock()
	all := make([]*stream, 0, len(d.streams))
	for _, s := range d.streams {
		all = append(all, s)
	}
	d.mu.Unlock()
	for _, s := range all {
		s.lock()
		s.finish()
		s.unlock()
	}
	d.running.Wait()
	d.poller.close()
	for {
		select {
		case b := <-d.scratch:
			d.closeScratch(b)
		default:
			return
		}
	}
}

// resume takes up a FIFO of the table. One that is gone was ended by the engine while nobody listened.
func (d *Driver) resume(e entry) error {
	if !e.Orphaned.IsZero() {
		d.removeFIFO(e.FIFO)
		return d.remember(e)
	}
	s, err := d.open(e)
	if errors.Is(err, os.ErrNotExist) {
		return d.remember(e)
	}
	if err != nil {
		return err
	}
	if err := s.reconcile(); err != nil {
		d.cfg.Log.Warn("lines may stand twice in a container's log", "container", e.Name, "err", err)
	}
	d.run(s)
	return nil
}

// start begins to take a container's output. A FIFO that is known already is no error: Docker asks again when it got no answer.
func (d *Driver) start(ctx context.Context, e entry) error {
	if d.find(e.FIFO) != nil {
		return nil
	}
	d.finishOthers(ctx, e)
	old := d.orphan(e.Container)
	s, err := d.open(e)
	if err != nil {
		return err
	}
	if err := s.goOnIn(old.Inode, old.Before, nil); err != nil && !isDiskTrouble(err) {
		s.finish()
		return err
	}
	d.alarms.lower(alarmDescriptors)
	if err := s.entry.keep(d.cfg.Directory); err != nil {
		s.finish()
		return err
	}
	d.forgetOrphan(e.Container) // not before its successor is in the table: this process may be killed at any moment
	d.run(s)
	return nil
}

// finishOthers writes what earlier FIFOs of the container still hold: an engine that was killed leaves one, and its successor brings another.
// The last of them is the container's orphan then.
func (d *Driver) finishOthers(ctx context.Context, e entry) {
	d.mu.Lock()
	var old []*stream
	for _, s := range d.streams {
		if s.entry.Container == e.Container {
			old = append(old, s)
		}
	}
	d.mu.Unlock()
	slices.SortFunc(old, func(a, b *stream) int { return a.entry.Began.Compare(b.entry.Began) })
	for _, s := range old {
		if d.end(ctx, s, s.abandon) {
			d.drop(s)
		} else {
			d.forget(s)
		}
		d.removeFIFO(s.entry.FIFO)
	}
}

// stopPatience is how long the end of a container waits for a disk.
const stopPatience = 20 * time.Second

// stop writes what the FIFO holds and forgets it. One that is unknown is no error.
func (d *Driver) stop(ctx context.Context, fifo string) {
	s := d.find(fifo)
	if s == nil {
		return
	}
	d.end(ctx, s, s.finish)
	d.forget(s)
	d.forgetOrphan(s.entry.Container)
}

// end writes what a stream's FIFO holds and finishes it, unless the disk does not answer.
func (d *Driver) end(ctx context.Context, s *stream, finish func()) bool {
	ctx, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	if err := s.lockFor(ctx); err != nil {
		d.cfg.Log.Warn("the end of a container's output is not yet written: the disk does not answer", "container", s.entry.Name)
		return false
	}
	defer s.unlock()
	s.drain()
	finish()
	return true
}

// removeFIFO removes the FIFO of an engine that has gone; its successor makes another.
func (d *Driver) removeFIFO(fifo string) {
	if err := os.Remove(fifo); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.cfg.Log.Warn("the FIFO of an engine that is gone is left", "fifo", fifo, "err", err)
	}
}

// remember keeps the entry of a container whose engine has gone for its successor, which must go on in the same file: the kubelet may have
// renamed it, and be about to rename it back over whatever stands in its place.
func (d *Driver) remember(e entry) (err error) {
	if e.Orphaned.IsZero() {
		e.Orphaned = time.Now()
		err = e.keep(d.cfg.Directory)
	}
	d.mu.Lock()
	other := d.orphans[e.Container]
	d.orphans[e.Container] = e
	d.mu.Unlock()
	if other.FIFO != "" && other.FIFO != e.FIFO {
		d.forgetEntry(&other)
	}

	// A container that was removed meanwhile has no successor.
	time.AfterFunc(d.cfg.EngineAway-time.Since(e.Orphaned), d.forgetOldOrphans)
	return err
}

// orphan is what is known of a container whose engine has gone, an empty entry if there is nothing.
func (d *Driver) orphan(container model.ContainerID) entry {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.orphans[container]
}

// forgetOldOrphans ends what remember began for containers whose engine has not come back.
func (d *Driver) forgetOldOrphans() {
	select {
	case <-d.closed: // the table is the next process's
	default:
		d.forgetOrphan("")
	}
}

// forgetOrphan ends what remember began for a container, and for those whose engine has not come back.
func (d *Driver) forgetOrphan(container model.ContainerID) {
	d.mu.Lock()
	var old []entry
	maps.DeleteFunc(d.orphans, func(c model.ContainerID, o entry) bool {
		end := c == container || time.Since(o.Orphaned) >= d.cfg.EngineAway
		if end {
			old = append(old, o)
		}
		return end
	})
	d.mu.Unlock()
	for _, o := range old {
		d.forgetEntry(&o)
	}
}

// forget takes a stream out of the table.
func (d *Driver) forget(s *stream) {
	d.drop(s)
	d.forgetEntry(&s.entry)
}

func (d *Driver) forgetEntry(e *entry) {
	part := spill{path: e.spillFile(d.cfg.Directory)}
	if err := errors.Join(part.remove(), e.forget(d.cfg.Directory)); err != nil {
		d.cfg.Log.Warn("log-driver's table keeps an entry too long", "container", e.Name, "err", err)
	}
}

// drop takes a stream out of those that run.
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

// of is the stream of a container, the newest if there are two; nil without one.
func (d *Driver) of(container model.ContainerID) *stream {
	d.mu.Lock()
	defer d.mu.Unlock()
	var newest *stream
	for _, s := range d.streams {
		if s.entry.Container == container && (newest == nil || s.entry.Began.After(newest.entry.Began)) {
			newest = s
		}
	}
	return newest
}

// run lets a stream go.
func (d *Driver) run(s *stream) {
	d.mu.Lock()
	d.streams[s.entry.FIFO] = s
	d.metrics.streams.Set(float64(len(d.streams)))
	d.mu.Unlock()
	d.running.Go(s.run)
}
