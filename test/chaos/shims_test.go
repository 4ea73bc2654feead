package chaos

import (
	"bufio"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/client"
)

// Engines lose shims. If containerd is killed while it creates or deletes a container, dockerd fails
// to remove the container from containerd, forgets it, and nobody ends its shim (log: "failed to
// delete container from containerd"; containerd issues 6860, 6771 and 9309). A process that runc had
// created and not started stays too, with its control groups. The engine's API does not show such a
// container, so the daemon cannot remove it. The checker permits exactly these: see isLost.

// containerdSocket is the socket of the containerd that dockerd starts.
const containerdSocket = "/run/docker/containerd/containerd.sock"

// shimID finds the ID of the container in a shim's command line.
var shimID = regexp.MustCompile(`^\S*containerd-shim-runc-v2 .*-id ([0-9a-f]{64})\b`)

// isShim reports whether a process is a containerd shim.
func isShim(p process) bool { return strings.HasPrefix(p.name, "containerd-shim") }

// containerOf returns the ID of the container that a shim runs, "" if its command line has none.
func containerOf(p process) string {
	if m := shimID.FindStringSubmatch(p.cmdline); m != nil && isShim(p) {
		return m[1]
	}
	return ""
}

// neverStarted is the name of a container's process that runc has created and not started.
const neverStarted = "runc:[2:INIT]"

// isLost reports whether the engine itself has lost a shim: containerd was killed while the shim
// ran, the engine does not know its container, and no process of the container was ever started. all
// are the processes of the node, killed the containers whose shims ran when containerd was killed,
// known those of the engine.
func isLost(shim process, all []process, killed, known map[string]bool) bool {
	id := containerOf(shim)
	hasStarted := func(p process) bool {
		return (p.parent == shim.pid || p.cgroup == id) && p.name != neverStarted
	}
	return id != "" && killed[id] && !known[id] && !slices.ContainsFunc(all, hasStarted)
}

// killContainerd runs kill, which kills containerd, and notes the shims that ran at that time.
func (l *lab) killContainerd(kill func() error) error {
	l.noteShims()
	defer l.noteShims() // also those that were about to start
	return kill()
}

// noteShims notes the containers whose shims run.
func (l *lab) noteShims() {
	all, err := l.list()
	if err != nil {
		l.tb.Errorf("list the shims: %v", err)
	}
	l.shims.Lock()
	defer l.shims.Unlock()
	for _, p := range all {
		if id := containerOf(p); id != "" {
			l.killed[id] = true
		}
	}
}

// findLost finds the containers whose shims the engine has lost.
func (l *lab) findLost(ctx context.Context) error {
	all, err := l.list()
	if err != nil {
		return err
	}
	l.shims.Lock()
	killed := maps.Clone(l.killed)
	l.shims.Unlock()

	lost := map[string]bool{}
	isSuspect := func(p process) bool { return killed[containerOf(p)] }
	if slices.ContainsFunc(all, isSuspect) {
		known, err := l.knownContainers(ctx)
		if err != nil {
			return err
		}
		for _, p := range all {
			if isLost(p, all, killed, known) {
				lost[containerOf(p)] = true
			}
		}
	}

	l.shims.Lock()
	defer l.shims.Unlock()
	l.lost = lost
	return nil
}

// isLost reports a container whose shim the engine had lost when findLost was last called.
func (l *lab) isLost(id string) bool {
	l.shims.Lock()
	defer l.shims.Unlock()
	return l.lost[id]
}

// knownContainers returns the containers that dockerd lists, and those that run in containerd.
func (l *lab) knownContainers(ctx context.Context) (map[string]bool, error) {
	known := map[string]bool{}
	inEngine, err := l.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, err
	}
	for _, c := range inEngine.Items {
		known[c.ID] = true
	}
	tasks, err := l.inside("ctr", "-a", containerdSocket, "-n", "moby", "tasks", "list")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(tasks) { // ID, PID, status
		if f := strings.Fields(line); len(f) == 3 && f[2] != "CREATED" && f[2] != "STOPPED" {
			known[f[0]] = true
		}
	}
	return known, nil
}

// reportLost logs how many shims the engine has lost and what its log has of each.
func (l *lab) reportLost(t *testing.T) {
	t.Helper()
	l.shims.Lock()
	lost := slices.Sorted(maps.Keys(l.lost))
	l.shims.Unlock()
	t.Logf("the engine has lost %d shims", len(lost))
	if len(lost) == 0 {
		return
	}
	log, err := os.Open(filepath.Join(l.eng.Dir, "docker.log"))
	if err != nil {
		t.Error(err)
		return
	}
	defer log.Close()
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if slices.ContainsFunc(lost, func(id string) bool { return strings.Contains(lines.Text(), id) }) {
			t.Log(lines.Text())
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		t.Error(err)
	}
}

// TestIsLost holds that the checker permits no shim but those that the engine has lost.
func TestIsLost(t *testing.T) {
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	shim := process{
		pid:     "10",
		parent:  "1",
		name:    "containerd-shim",
		cmdline: "/usr/bin/containerd-shim-runc-v2 -namespace moby -id " + id + " -address " + containerdSocket,
	}
	nameless, program := shim, shim
	nameless.cmdline = "/usr/bin/containerd-shim-runc-v2 -namespace moby"
	program.name = "sh"
	init := process{pid: "1", parent: "0", name: "runc"}
	only := func(id string) map[string]bool { return map[string]bool{id: true} }

	for name, c := range map[string]struct {
		shim          process
		others        []process
		killed, known map[string]bool
		lost          bool
	}{
		"lost":                             {shim: shim, killed: only(id), known: only(other), lost: true},
		"containerd was not killed":        {shim: shim},
		"started after containerd's death": {shim: shim, killed: only(other)},
		"a container of the engine":        {shim: shim, killed: only(id), known: only(id)},
		"no container":                     {shim: nameless, killed: only("")},
		"no shim":                          {shim: program, killed: only(id)},
		"a child": {
			shim:   shim,
			others: []process{{pid: "11", parent: "10", name: "sh"}},
			killed: only(id),
		},
		"a process that was never started": {
			shim:   shim,
			others: []process{{pid: "11", parent: "10", name: neverStarted, cgroup: id}},
			killed: only(id),
			lost:   true,
		},
		"a second process, which was started": {
			shim: shim,
			others: []process{
				{pid: "11", parent: "10", name: neverStarted, cgroup: id},
				{pid: "12", parent: "11", name: "sh", cgroup: id},
			},
			killed: only(id),
		},
		"an orphan of the container": {
			shim:   shim,
			others: []process{{pid: "11", parent: "1", name: "sh", cgroup: id}},
			killed: only(id),
		},
		"another's child": {
			shim:   shim,
			others: []process{{pid: "11", parent: "12", name: "sh", cgroup: other}},
			killed: only(id),
			lost:   true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			all := append([]process{init, c.shim}, c.others...)
			if got := isLost(c.shim, all, c.killed, c.known); got != c.lost {
				t.Errorf("lost %v, want %v", got, c.lost)
			}
		})
	}
}
