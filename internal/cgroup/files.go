package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// file is a kernel file of a group.
type file uint8

const (
	cpuacctUsage file = iota // cgroup v1 from here on
	cpuacctStat
	cpuStat1
	memoryUsage
	memoryStat1
	memoryMaxUsage
	memoryFailcnt
	memoryOOMControl
	kmemUsage
	pidsCurrent1
	pidsMax1
	blkioBytes
	blkioOperations
	cpuStat // cgroup v2 from here on
	memoryCurrent
	memoryStat
	memoryMax
	memoryPeak
	memoryEvents
	swapCurrent
	swapMax
	pidsCurrent
	pidsMax
	ioStat
	cpuPressure // on hybrid machines too
	memoryPressure
	ioPressure
	allFiles
)

// kernelFiles are the names of the files and, for cgroup v1, their controllers.
var kernelFiles = [allFiles]struct {
	controller controller
	name       string
}{
	cpuacctUsage:     {cpuacct, "cpuacct.usage"},
	cpuacctStat:      {cpuacct, "cpuacct.stat"},
	cpuStat1:         {cpu, "cpu.stat"},
	memoryUsage:      {memory, "memory.usage_in_bytes"},
	memoryStat1:      {memory, "memory.stat"},
	memoryMaxUsage:   {memory, "memory.max_usage_in_bytes"},
	memoryFailcnt:    {memory, "memory.failcnt"},
	memoryOOMControl: {memory, "memory.oom_control"},
	kmemUsage:        {memory, "memory.kmem.usage_in_bytes"},
	pidsCurrent1:     {pids, "pids.current"},
	pidsMax1:         {pids, "pids.max"},
	blkioBytes:       {blkio, "blkio.throttle.io_service_bytes_recursive"},
	blkioOperations:  {blkio, "blkio.throttle.io_serviced_recursive"},
	cpuStat:          {unified, "cpu.stat"},
	memoryCurrent:    {unified, "memory.current"},
	memoryStat:       {unified, "memory.stat"},
	memoryMax:        {unified, "memory.max"},
	memoryPeak:       {unified, "memory.peak"},
	memoryEvents:     {unified, "memory.events"},
	swapCurrent:      {unified, "memory.swap.current"},
	swapMax:          {unified, "memory.swap.max"},
	pidsCurrent:      {unified, "pids.current"},
	pidsMax:          {unified, "pids.max"},
	ioStat:           {unified, "io.stat"},
	cpuPressure:      {unified, "cpu.pressure"},
	memoryPressure:   {unified, "memory.pressure"},
	ioPressure:       {unified, "io.pressure"},
}

// files are a group's open files. Each is opened on the first read and then read again from its
// beginning, because opening takes ten times as long as readSize. An open file does not prevent the
// removal of its group. A later read then reports NotFound.
type files struct {
	mu     sync.Mutex // guards the fields below, and prevents closing a file during a read
	fds    [allFiles]int32
	closed bool
	buf    []byte
}

// Special values in files.fds. Descriptors are stored plus one.
const (
	unopened = 0
	absent   = -1
)

// readSize is the number of bytes read at once. It exceeds the size of all kernelFiles. The
// remainder of a larger file would be ignored.
const readSize = 16 << 10

// buffers holds buffers for reading one group at a time.
var buffers = sync.Pool{New: func() any { b := make([]byte, readSize); return &b }}

// Close closes the open files. A closed group cannot be read again.
func (g *Group) Close() {
	g.files.mu.Lock()
	defer g.files.mu.Unlock()

	g.files.closed = true
	for i, fd := range g.files.fds {
		if fd > 0 {
			_ = unix.Close(int(fd - 1)) // it was only read
		}
		g.files.fds[i] = absent
	}

	g.proc.close()
}

// beginRead locks the group's files for one read, until the returned function is called.
func (g *Group) beginRead() (end func()) {
	g.files.mu.Lock()
	b := buffers.Get().(*[]byte)
	g.files.buf = *b

	return func() {
		g.files.buf = nil
		buffers.Put(b)
		g.files.mu.Unlock()
	}
}

// readContent reads a file between beginRead and its end. The result is valid until the next read.
// Errors: fs.ErrNotExist if this kernel has no such file, NotFound if the group has been removed.
func (g *Group) readContent(f file) ([]byte, error) {
	fd := g.files.fds[f]
	if fd == unopened {
		var err error
		if fd, err = g.open(f); err != nil {
			return nil, err
		}
		g.files.fds[f] = fd
	}

	if g.files.closed {
		return nil, fmt.Errorf("control group %s: %w", g.path, errdefs.ErrNotFound)
	}
	if fd == absent {
		return nil, fs.ErrNotExist
	}

	for {
		n, err := unix.Pread(int(fd-1), g.files.buf, 0)
		switch {
		case err == nil && n == len(g.files.buf): // the last line may be incomplete
			return g.files.buf[:bytes.LastIndexByte(g.files.buf, '\n')+1], nil
		case err == nil:
			return g.files.buf[:n], nil
		case errors.Is(err, unix.ENODEV):
			return nil, fmt.Errorf("control group %s: %w", g.path, errdefs.ErrNotFound)
		case !errors.Is(err, unix.EINTR):
			return nil, fmt.Errorf("%s of control group %s: %w", kernelFiles[f].name, g.path, err)
		}
	}
}

// open opens a file and returns its value for files.fds.
func (g *Group) open(f file) (int32, error) {
	root, path := g.locate(kernelFiles[f].controller)
	if f >= cpuPressure {
		root, path = g.locatePressure()
	}
	if root == "" {
		return absent, nil
	}

	fd, err := openBeneath(root, path+"/"+kernelFiles[f].name, unix.O_RDONLY)
	switch {
	case err == nil:
		return int32(fd) + 1, nil
	case errors.Is(err, unix.ENOENT) && !groupExists(root, path):
		return unopened, fmt.Errorf("control group %s: %w", g.path, errdefs.ErrNotFound)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		return absent, nil
	}

	return unopened, fmt.Errorf("%s of control group %s: %w", kernelFiles[f].name, g.path, err)
}

// readCounter reads a file's only number.
func (g *Group) readCounter(f file) (uint64, error) {
	b, err := g.readContent(f)
	if err != nil {
		return 0, err
	}
	return parse(trim(b))
}

// readOptional reads a file's number. It returns nil if the kernel has no such file or reports
// "max".
func (g *Group) readOptional(f file) *uint64 {
	n, err := g.readCounter(f)
	if err != nil {
		return nil
	}
	return ptr(n)
}

// ptr returns a pointer to n. (Taking the address of a variable in place would allocate it even
// when it is unused.)
func ptr(n uint64) *uint64 { return &n }

// readTable calls each for every line with a name and a number.
func (g *Group) readTable(f file, each func(name []byte, value uint64)) error {
	b, err := g.readContent(f)
	if err != nil {
		return err
	}

	for len(b) > 0 {
		var line []byte
		line, b = cut(b, '\n')
		name, value := cut(line, ' ')
		if n, err := parse(value); err == nil {
			each(name, n)
		}
	}

	return nil
}

// cut splits b around the first sep. It copies nothing.
func cut(b []byte, sep byte) (before, after []byte) {
	for i, c := range b {
		if c == sep {
			return b[:i], b[i+1:]
		}
	}
	return b, nil
}

// trim removes the line end.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == ' ') {
		b = b[:len(b)-1]
	}
	return b
}

var errNoNumber = errors.New("not a number")

// parse parses a decimal number. Files often contain "max" instead, so its error is preallocated.
func parse(b []byte) (uint64, error) {
	if len(b) == 0 || b[0] < '0' || b[0] > '9' {
		return 0, errNoNumber
	}
	return strconv.ParseUint(string(b), 10, 64)
}
