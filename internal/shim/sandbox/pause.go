package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Status is the status of a pause.
type Status int

// The values of Status, in the terms of containerd's task service.
const (
	Created Status = iota
	Running
	Paused
	Stopped
)

// Pause is the pause process of a pod.
type Pause struct {
	Bundle string
	Stdio  Stdio
	Pid    int

	cgroup string // path of group
	group  group
	signal func(unix.Signal) error
	reaped chan struct{} // closed when exit is known
	exit   Exit
	ended  chan struct{} // closed when the pause is Stopped

	mu     sync.Mutex
	status Status
}

// Stdio holds the paths of the FIFOs of a process, "" for none.
type Stdio struct{ Stdin, Stdout, Stderr string }

// Exit is the end of a process.
type Exit struct {
	Code int       `json:"code"` // 128 and the number of a signal, as a shell's
	At   time.Time `json:"at"`
}

// Start starts the pause. The caller must call Finish on a goroutine of its own. A failed start
// leaves nothing behind.
func Start(ctx context.Context, plan *Plan, dir string, io Stdio) (p *Pause, err error) {
	files, closeFiles, err := open(io)
	if err != nil {
		return nil, err
	}
	defer closeFiles()

	// Written before the process exists: Clean removes the control group in any case.
	if err := writeState(dir, state{Cgroup: plan.cgroup}); err != nil {
		return nil, err
	}

	p = &Pause{
		Bundle: dir,
		Stdio:  io,
		cgroup: plan.cgroup,
		reaped: make(chan struct{}),
		ended:  make(chan struct{}),
	}
	if p.group, err = newGroup(plan.cgroup, plan.limits); err != nil {
		return nil, errors.Join(err, removeGroup(ctx, plan.cgroup))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, awaitEmpty(p.group), p.group.remove(context.WithoutCancel(ctx)))
		}
	}()

	exits := reaper.Default.Subscribe()
	if p.Pid, err = plan.fork(p.group, append(slices.Clone(plan.env), mark(dir)), files); err != nil {
		reaper.Default.Unsubscribe(exits)
		return nil, err
	}

	process, err := os.FindProcess(p.Pid) // holds a pidfd
	if err != nil {
		reaper.Default.Unsubscribe(exits)
		return nil, err
	}

	p.signal = func(s unix.Signal) error { return process.Signal(s) }
	go p.awaitExit(exits)
	if err := p.complete(ctx, plan); err != nil {
		return nil, errors.Join(err, p.kill())
	}

	return p, nil
}

// awaitExit waits until the process is reaped.
func (p *Pause) awaitExit(exits chan runc.Exit) {
	for e := range exits {
		if e.Pid == p.Pid {
			p.exit = Exit{e.Status, e.Timestamp}
			close(p.reaped)
			reaper.Default.Unsubscribe(exits)
			return
		}
	}
}

// Finish waits for the end of the process, records it in the bundle, calls publish, and marks the
// pause as Stopped. So the event of the exit precedes that of a deletion.
func (p *Pause) Finish(publish func(Exit)) error {
	<-p.reaped
	err := writeState(p.Bundle, state{Pid: p.Pid, Cgroup: p.cgroup, Exit: &p.exit})
	publish(p.exit)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = Stopped
	close(p.ended)

	return err
}

// complete gives the running process what it cannot inherit.
func (p *Pause) complete(ctx context.Context, plan *Plan) error {
	start, err := startTime(p.Pid)
	if err != nil {
		return err
	}

	return errors.Join(
		writeState(p.Bundle, state{Pid: p.Pid, Start: start, Cgroup: plan.cgroup}),
		p.group.add(ctx, p.Pid),
		setOOMScore(p.Pid, plan.oomScore),
		checkAppArmor(p.Pid, plan.apparmor),
	)
}

// checkAppArmor checks that a process has its profile: a kernel could ignore the request.
func checkAppArmor(pid int, profile string) error {
	if profile == "" || profile == "unconfined" {
		return nil
	}

	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid))
	if name, _, _ := strings.Cut(strings.TrimRight(string(text), "\x00\n"), " ("); err == nil && name != profile {
		err = fmt.Errorf("the process has %q", name)
	}

	return wrap(err, "AppArmor profile %s", profile)
}

// open opens the FIFOs of a process. Descriptors for reading and writing do not block, and end with
// the process: the reader then sees the end of the output.
func open(io Stdio) (fds [3]uintptr, closeAll func(), err error) {
	var files []*os.File
	closeAll = func() {
		for _, f := range files {
			f.Close()
		}
	}

	for i, path := range []string{"", io.Stdout, io.Stderr} { // a pause reads nothing
		if path == "" {
			path = os.DevNull
		}

		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			closeAll()
			return fds, nil, err
		}

		files = append(files, f)
		fds[i] = f.Fd()
	}

	return fds, closeAll, nil
}

// State returns the status, and the exit of a stopped pause.
func (p *Pause) State() (Status, Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != Stopped {
		return p.status, Exit{}
	}
	return p.status, p.exit
}

// change changes the status from one to another.
func (p *Pause) change(from, to Status) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != from {
		return fmt.Errorf("pause is in status %d, not %d: %w", p.status, from, errdefs.ErrFailedPrecondition)
	}
	p.status = to

	return nil
}

// Run marks the created pause as running. Its process runs already.
func (p *Pause) Run() error { return p.change(Created, Running) }

// Freeze stops the pause with its control group.
func (p *Pause) Freeze() error {
	if err := p.change(Running, Paused); err != nil {
		return err
	}
	if err := p.group.freeze(); err != nil {
		return errors.Join(err, p.change(Paused, Running))
	}
	return nil
}

// Thaw continues the pause after Freeze.
func (p *Pause) Thaw() error {
	if err := p.group.thaw(); err != nil {
		return err
	}
	return p.change(Paused, Running)
}

// Signal sends a signal to the pause. NotFound if it has ended.
func (p *Pause) Signal(s unix.Signal) error {
	err := p.signal(s)
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pause %d has ended: %w", p.Pid, errdefs.ErrNotFound)
	}
	return err
}

// Wait waits for the end of the pause.
func (p *Pause) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.ended:
		return p.exit, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// kill ends the pause of a failed start and waits for it.
func (p *Pause) kill() error {
	if err := p.Signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}

	select {
	case <-p.reaped:
		return nil
	case <-time.After(killTimeout):
		return fmt.Errorf("pause %d does not end within %v", p.Pid, killTimeout)
	}
}

// Update changes the limits of the pause.
func (p *Pause) Update(ctx context.Context, r *specs.LinuxResources) error {
	return p.group.update(ctx, r)
}

// Stats returns the usage of the pause in containerd's form, a message of its API.
func (p *Pause) Stats() (any, error) { return p.group.stats() }

// Delete removes the control group of a stopped pause.
func (p *Pause) Delete(ctx context.Context) (Exit, error) {
	status, exit := p.State()
	if status != Stopped {
		return exit, fmt.Errorf("pause %d is running: %w", p.Pid, errdefs.ErrFailedPrecondition)
	}
	return exit, p.group.remove(ctx)
}
