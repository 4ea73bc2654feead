package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// Limits on a container's processes. There may be as many as the kernel has PIDs, in any number of
// own groups. Beyond these limits a count is too low.
const (
	maxPIDs       = 1 << 16
	maxGroups     = 1 << 12
	maxListing    = 1 << 20 // bytes of one cgroup.procs: 130,000 PIDs
	maxListedTime = 200 * time.Millisecond
)

// listedTime is maxListedTime, except in tests of other limits.
var listedTime = maxListedTime

// ErrTooMany is returned for a container with more processes or groups than the limits.
var ErrTooMany = fmt.Errorf("the container has more than %d processes or %d control groups of its own: %w",
	maxPIDs, maxGroups, errdefs.ErrResourceExhausted)

// processDir is the directory of a process in /proc. While it is open, it refers to the same
// process, even after the PID is reused.
type processDir struct {
	mu sync.RWMutex
	fd int32 // descriptor plus one; 0 without one
}

// open opens a file of the process for reading.
func (p *processDir) open(name string) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.fd == 0 {
		return -1, fs.ErrNotExist
	}
	return openat(int(p.fd-1), name, unix.O_RDONLY)
}

func (p *processDir) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fd > 0 {
		_ = unix.Close(int(p.fd - 1)) // a descriptor of a path only
	}
	p.fd = 0
}

// ReadProcess appends at most limit bytes of a file of the container's main process (proc_pid(5)),
// such as "net/dev", to buf. It reads the process found by FindGroup. If the PID has been reused
// since, the error is fs.ErrNotExist or ESRCH.
func (g *Group) ReadProcess(name string, buf []byte, limit int) ([]byte, error) {
	fd, err := g.proc.open(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	return readOpen(fd, name, buf, limit)
}

// ReadProcessPieces calls use with the content of a file of the main process piece by piece, until
// use returns false.
func (g *Group) ReadProcessPieces(name string, use func(piece []byte) bool) error {
	fd, err := g.proc.open(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read

	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)

	for {
		n, err := unix.Read(fd, *b)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return &fs.PathError{Op: "read", Path: name, Err: err}
		case n == 0 || !use((*b)[:n]) || n < atEnd:
			return nil
		}
	}
}

// IsAlive reports whether the main process still runs.
func (g *Group) IsAlive() bool {
	fd, err := g.proc.open("cgroup")
	if err == nil {
		_ = unix.Close(fd) // it was only opened
	}
	return err == nil
}

// OOMScoreAdj returns the main process's score (proc_pid_oom_score_adj(5)).
func (g *Group) OOMScoreAdj() (int, error) {
	b, err := g.ReadProcess("oom_score_adj", nil, 64)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// forkRounds is the number of times to check for newly forked processes.
const forkRounds = 5

// SetOOMScoreAdj sets the score of every process of the container. Future processes inherit it. A
// permission error means that this process may not set so low a score. ErrTooMany means that some
// processes still have their old score.
func (g *Group) SetOOMScoreAdj(score int) error {
	done := map[int]bool{}
	for range forkRounds {
		pids, complete, err := g.listProcesses()
		if errdefs.IsNotFound(err) {
			return nil // it has ended
		} else if err != nil {
			return err
		}

		added := false
		for _, pid := range pids {
			if done[pid] {
				continue
			}
			if err := g.setScore(pid, score); err != nil {
				return fmt.Errorf("oom_score_adj of process %d: %w", pid, err)
			}
			done[pid], added = true, true
		}

		if !complete {
			return fmt.Errorf("oom_score_adj: %w", ErrTooMany)
		}
		if !added {
			break
		}
	}

	return nil
}

// setScore sets the score of one process if it belongs to the container. Its PID may have been
// reused since the listing. The descriptor of its directory in /proc always refers to the same
// process.
func (g *Group) setScore(pid, score int) error {
	name := filepath.Join(g.kernel.Proc, strconv.Itoa(pid))
	proc, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ignoreEnded(err)
	}
	defer unix.Close(proc) //nolint:errcheck // a descriptor of a path only

	b, err := readAt(proc, "cgroup", nil, maxMembership)
	if err != nil {
		return ignoreEnded(err)
	}

	var of Group
	if !of.parseMembership(string(b), filepath.Base(g.path)) || of.path != g.path {
		return nil // the PID was reused, or the process has moved away
	}

	fd, err := openat(proc, "oom_score_adj", unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return ignoreEnded(err)
	}

	_, err = unix.Write(fd, []byte(strconv.Itoa(score)))

	return errors.Join(ignoreEnded(err), unix.Close(fd))
}

// Processes returns the number of processes, at most maxPIDs. It returns NotFound if the group has
// been removed.
func (g *Group) Processes() (uint64, error) {
	pids, err := g.PIDs()
	return uint64(len(pids)), err
}

// PIDs returns the processes of the group and of the groups below it, at most maxPIDs. It returns
// NotFound if the group has been removed.
func (g *Group) PIDs() ([]int, error) {
	if g.isSingleProcess() {
		return []int{g.pid}, nil
	}
	pids, _, err := g.listProcesses()
	return pids, err
}

// isSingleProcess reports whether the container consists of its main process alone, without
// threads. Most do, and listing the processes costs ten times as much. A container ends with its
// main process.
func (g *Group) isSingleProcess() bool {
	defer g.beginRead()()
	f := pidsCurrent1
	if g.V2() {
		f = pidsCurrent
	}
	n, err := g.readCounter(f)
	return err == nil && n == 1 && g.pid > 0
}

// listProcesses returns the container's processes, including those in groups created by the
// container. complete is false if a limit was reached.
func (g *Group) listProcesses() (all []int, complete bool, err error) {
	root, path := g.locate(unified)
	for _, c := range []controller{memory, pids, cpu, devices} {
		if root == "" {
			root, path = g.locate(c)
		}
	}

	dir, err := openBeneath(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, false, fmt.Errorf("control group %s: %w: %w", g.path, err, errdefs.ErrNotFound)
	}

	f := os.NewFile(uintptr(dir), g.path)
	defer f.Close()

	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return nil, false, err
	}

	if st.Nlink == 2 { // its own name and the entry in its parent: no groups below
		all, err = appendMembers(nil, dir)
		return all, len(all) < maxPIDs, err
	}

	return g.listProcessesBelow(f)
}

// listProcessesBelow walks the groups created by the container.
func (g *Group) listProcessesBelow(dir *os.File) (pids []int, complete bool, err error) {
	w, err := safefs.NewWalker(dir)
	if err != nil {
		return nil, false, err
	}
	defer w.Close()

	groups := 0
	w.Dir = func(fd int, _ *unix.Stat_t) (err error) {
		groups++
		if pids, err = appendMembers(pids, fd); err != nil {
			return err
		}

		if len(pids) >= maxPIDs || groups >= maxGroups {
			return ErrTooMany
		}

		return nil
	}

	complete, err = w.Walk(time.Now().Add(listedTime))
	if errors.Is(err, ErrTooMany) {
		return pids, false, nil
	}

	return pids, complete && !w.Partial(), err
}

// appendMembers appends the processes of one group to pids, up to maxPIDs. It reopens the file each
// time, because cgroup v1 caches the list for a second per open file.
func appendMembers(pids []int, dir int) ([]int, error) {
	var buf [512]byte
	b, err := readAt(dir, "cgroup.procs", buf[:0], maxListing)
	if err != nil {
		return pids, ignoreEnded(err)
	}

	for len(b) > 0 && len(pids) < maxPIDs {
		var line []byte
		line, b = cut(b, '\n')
		if pid, err := parse(line); err == nil && pid <= maxPID {
			pids = append(pids, int(pid))
		}
	}

	return pids, nil
}

// maxPID is the kernel's limit (PID_MAX_LIMIT).
const maxPID = 1 << 22

// ignoreEnded drops errors caused by the concurrent end of a process or group.
func ignoreEnded(err error) error {
	for _, ended := range []error{fs.ErrNotExist, unix.ESRCH, unix.ENODEV, unix.EOPNOTSUPP} {
		if errors.Is(err, ended) {
			return nil
		}
	}
	return err
}
