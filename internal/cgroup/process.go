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

// Bounds of what is read of a container's processes, which may be as many as the kernel has PIDs,
// in any number of groups of their own. Beyond them a count is too low.
const (
	maxPIDs       = 1 << 16
	maxGroups     = 1 << 12
	maxListing    = 1 << 20 // bytes of one cgroup.procs: 130,000 PIDs
	maxListedTime = 200 * time.Millisecond
)

// listedTime is maxListedTime, but in tests of other bounds.
var listedTime = maxListedTime

// ErrTooMany says that a container has more processes or groups than are read.
var ErrTooMany = fmt.Errorf("the container has more than %d processes or %d control groups of its own: %w",
	maxPIDs, maxGroups, errdefs.ErrResourceExhausted)

// processDir is the directory of a process in /proc. It is that process's as long as it is open,
// also when the PID has been reused.
type processDir struct {
	mu sync.RWMutex
	fd int32 // plus one; 0 for none
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

// ReadProcess appends a file of the container's main process (proc_pid(5)), such as "net/dev", to
// buf, and at most limit bytes of it. The process is that which Of has found: its PID may have been
// reused since, and then the error is fs.ErrNotExist or ESRCH.
func (g *Group) ReadProcess(name string, buf []byte, limit int) ([]byte, error) {
	fd, err := g.proc.open(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	return readOpen(fd, name, buf, limit)
}

// EachOfProcess calls use with the content of a file of the main process piece by piece, until it
// returns false.
func (g *Group) EachOfProcess(name string, use func(piece []byte) bool) error {
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

// Alive says whether the main process has not ended.
func (g *Group) Alive() bool {
	fd, err := g.proc.open("cgroup")
	if err == nil {
		_ = unix.Close(fd) // it was only opened
	}
	return err == nil
}

// OOMScoreAdj is the main process's score (proc_pid_oom_score_adj(5)).
func (g *Group) OOMScoreAdj() (int, error) {
	b, err := g.ReadProcess("oom_score_adj", nil, 64)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// forkRounds is how often processes that were forked meanwhile are looked for.
const forkRounds = 5

// SetOOMScoreAdj gives every process of the container a score. It is inherited, so processes to
// come have it too. A permission error means that the score is below what this process may give,
// ErrTooMany that some have not got it.
func (g *Group) SetOOMScoreAdj(score int) error {
	done := map[int]bool{}
	for range forkRounds {
		pids, complete, err := g.processes()
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

// setScore writes the score of one process, if it is the container's: its PID may have been reused
// since it was listed. The descriptor of its directory in /proc stays that process's.
func (g *Group) setScore(pid, score int) error {
	name := filepath.Join(g.kernel.Proc, strconv.Itoa(pid))
	proc, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer unix.Close(proc) //nolint:errcheck // a descriptor of a path only

	b, err := readAt(proc, "cgroup", nil, maxMembership)
	if err != nil {
		return ignoreGone(err)
	}

	var of Group
	if !of.join(string(b), filepath.Base(g.path)) || of.path != g.path {
		return nil // another process by now, or one that has moved away
	}

	fd, err := openat(proc, "oom_score_adj", unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return ignoreGone(err)
	}

	_, err = unix.Write(fd, []byte(strconv.Itoa(score)))

	return errors.Join(ignoreGone(err), unix.Close(fd))
}

// Processes is how many there are, and at most maxPIDs. NotFound if the group is gone.
func (g *Group) Processes() (uint64, error) {
	pids, err := g.PIDs()
	return uint64(len(pids)), err
}

// PIDs are the processes of the group and of those below it, at most maxPIDs. NotFound if the group
// is gone.
func (g *Group) PIDs() ([]int, error) {
	if g.alone() {
		return []int{g.pid}, nil
	}
	pids, _, err := g.processes()
	return pids, err
}

// alone says that a container's main process, without which it ends, has no other and no threads:
// most have none, and to look for them costs ten times as much.
func (g *Group) alone() bool {
	defer g.begin()()
	f := pidsCurrent1
	if g.V2() {
		f = pidsCurrent
	}
	n, err := g.number(f)
	return err == nil && n == 1 && g.pid > 0
}

// processes are the container's, those in groups that it has made itself included. complete is
// false if a bound was reached.
func (g *Group) processes() (all []int, complete bool, err error) {
	root, path := g.place(unified)
	for _, c := range []controller{memory, pids, cpu, devices} {
		if root == "" {
			root, path = g.place(c)
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

	if st.Nlink == 2 { // its own name and that in its parent: there are no groups below it
		all, err = members(nil, dir)
		return all, len(all) < maxPIDs, err
	}

	return g.processesBelow(f)
}

// processesBelow walks the groups that a container has made.
func (g *Group) processesBelow(dir *os.File) (pids []int, complete bool, err error) {
	w, err := safefs.NewWalker(dir)
	if err != nil {
		return nil, false, err
	}
	defer w.Close()

	groups := 0
	w.Dir = func(fd int, _ *unix.Stat_t) (err error) {
		groups++
		if pids, err = members(pids, fd); err != nil {
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

// members adds the processes of one group, to maxPIDs at most. The file is opened anew each time,
// since cgroup v1 shows the same list for a second to one who reads on.
func members(pids []int, dir int) ([]int, error) {
	var buf [512]byte
	b, err := readAt(dir, "cgroup.procs", buf[:0], maxListing)
	if err != nil {
		return pids, ignoreGone(err)
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

// ignoreGone drops the error that a process or group has ended meanwhile.
func ignoreGone(err error) error {
	for _, gone := range []error{fs.ErrNotExist, unix.ESRCH, unix.ENODEV, unix.EOPNOTSUPP} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return err
}
