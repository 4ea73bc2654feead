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

// file is one of the kernel's files of a group.
type file uint8

const (
	cpuacctUsage file = iota // from here on cgroup v1
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
	cpuStat // from here on cgroup v2
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

// kernelFiles are the names of the files, and for cgroup v1 the controllers that they belong to.
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

// files are a group's open files. Each is opened when it is first read and then read from its
// beginning again and again, since opening takes ten times as long as reading. What is open does
// not keep a group from being removed; it is then read as gone.
type files struct {
	mu     sync.Mutex // guards the rest, and keeps a file from being closed while it is read
	fds    [allFiles]int32
	closed bool
	buf    []byte
}

// Marks in files.fds beside the descriptors, which are kept plus one.
const (
	unopened = 0
	absent   = -1
)

// reading is how much of a file is read at once, in bytes: more than any of kernelFiles has. Should
// one have more, the rest is not seen.
const reading = 16 << 10

// buffers are for the reading of one group at a time.
var buffers = sync.Pool{New: func() any { b := make([]byte, reading); return &b }}

// Close closes the files that are open. A group that is closed cannot be read any more.
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

// begin takes the group's files for one reading, which ends when the returned function is called.
func (g *Group) begin() (end func()) {
	g.files.mu.Lock()
	b := buffers.Get().(*[]byte)
	g.files.buf = *b

	return func() {
		g.files.buf = nil
		buffers.Put(b)
		g.files.mu.Unlock()
	}
}

// content reads a file between begin and end; it is valid until the next one is read.
// fs.ErrNotExist if this kernel has no such file, NotFound if the group is gone.
func (g *Group) content(f file) ([]byte, error) {
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

// open opens a file and returns what stands for it in files.fds.
func (g *Group) open(f file) (int32, error) {
	root, path := g.place(kernelFiles[f].controller)
	if f >= cpuPressure {
		root, path = g.pressurePlace()
	}
	if root == "" {
		return absent, nil
	}

	fd, err := openBeneath(root, path+"/"+kernelFiles[f].name, unix.O_RDONLY)
	switch {
	case err == nil:
		return int32(fd) + 1, nil
	case errors.Is(err, unix.ENOENT) && !isThere(root, path):
		return unopened, fmt.Errorf("control group %s: %w", g.path, errdefs.ErrNotFound)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		return absent, nil
	}

	return unopened, fmt.Errorf("%s of control group %s: %w", kernelFiles[f].name, g.path, err)
}

// number is a file's only number.
func (g *Group) number(f file) (uint64, error) {
	b, err := g.content(f)
	if err != nil {
		return 0, err
	}
	return parse(trim(b))
}

// told is a file's number, nil where the kernel does not tell one, or says "max".
func (g *Group) told(f file) *uint64 {
	n, err := g.number(f)
	if err != nil {
		return nil
	}
	return some(n)
}

// some is a number that is told. (A number whose address is taken where it stands is allocated even
// if it is of no interest.)
func some(n uint64) *uint64 { return &n }

// table calls each with every line of a file that has a name and a number.
func (g *Group) table(f file, each func(name []byte, value uint64)) error {
	b, err := g.content(f)
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

// cut is what stands before and after the first sep; nothing is copied.
func cut(b []byte, sep byte) (before, after []byte) {
	for i, c := range b {
		if c == sep {
			return b[:i], b[i+1:]
		}
	}
	return b, nil
}

// trim takes off the line's end.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == ' ') {
		b = b[:len(b)-1]
	}
	return b
}

var errNoNumber = errors.New("not a number")

// parse is a decimal number. Files often say "max" instead, for which no error is to be made anew.
func parse(b []byte) (uint64, error) {
	if len(b) == 0 || b[0] < '0' || b[0] > '9' {
		return 0, errNoNumber
	}
	return strconv.ParseUint(string(b), 10, 64)
}
