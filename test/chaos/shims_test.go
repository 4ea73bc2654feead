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

// Engines lose containers. If containerd is killed while it creates or deletes a container, dockerd
// fails to remove the container from containerd and forgets it, and its shim never ends (log:
// "failed to delete container from containerd"; containerd issues 6860, 6771 and 9309). A process
// created but not started by runc remains too, with its cgroups, and Docker 29 does not unmount the
// container's root. The engine's API does not show such a container, so the daemon cannot remove
// it. The checker permits exactly these: see isLost.

// containerdSocket is the socket of dockerd's containerd.
const containerdSocket = "/run/docker/containerd/containerd.sock"

// shimID finds the ID of the container in a shim's command line.
var shimID = regexp.MustCompile(`^\S*containerd-shim-runc-v2 .*-id ([0-9a-f]{64})\b`)

// isShim reports whether a process is a containerd shim.
func isShim(p process) bool { return strings.HasPrefix(p.name, "containerd-shim") }

// containerOf returns the ID of a shim's container, "" if its command line has none.
func containerOf(p process) string {
	if m := shimID.FindStringSubmatch(p.cmdline); m != nil && isShim(p) {
		return m[1]
	}
	return ""
}

// neverStarted is the process name of a container that runc has created and not started.
const neverStarted = "runc:[2:INIT]"

// isLost reports whether the engine itself has lost a container: dockerd or containerd was killed
// while the container had a shim or a mounted root, the engine does not know it, and none of its
// processes was ever started. all contains the processes of the node, killed the containers
// existing when the engine was killed, and known the engine's containers.
func isLost(id string, all []process, killed, known map[string]bool) bool {
	shims := map[string]bool{}
	for _, p := range all {
		if containerOf(p) == id {
			shims[p.pid] = true
		}
	}

	hasStarted := func(p process) bool {
		return (shims[p.parent] || p.cgroup == id) && p.name != neverStarted
	}

	return id != "" && killed[id] && !known[id] && !slices.ContainsFunc(all, hasStarted)
}

// killContainerd calls kill to kill containerd, and records the existing containers.
func (l *lab) killContainerd(kill func() error) error {
	l.noteContainers()
	defer l.noteContainers() // includes containers about to start
	return kill()
}

// noteContainers records the containers with a shim or a mounted root.
func (l *lab) noteContainers() {
	all, err := l.list()
	mounts, err2 := l.mounts()
	if err := errors.Join(err, err2); err != nil {
		l.tb.Errorf("list the engine's containers: %v", err)
	}

	l.shims.Lock()
	defer l.shims.Unlock()

	for _, p := range all {
		if id := containerOf(p); id != "" {
			l.killed[id] = true
		}
	}

	for _, m := range mounts {
		if id := l.rootOf(m); id != "" {
			l.killed[id] = true
		}
	}
}

// mounts returns the mount points of the node.
func (l *lab) mounts() (points []string, err error) {
	b, err := os.ReadFile(l.eng.Path("/proc/1/mountinfo"))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			points = append(points, f[4])
		}
	}
	return points, err
}

// mountedFor finds the container in a mount point below the engine's data: its root (Docker 29), or
// its shared memory.
var mountedFor = regexp.MustCompile(`^/(?:rootfs/overlayfs/([0-9a-f]{64})|containers/([0-9a-f]{64})/mounts/shm)$`)

// rootOf returns the container of one of the engine's mount points, "" for none.
func (l *lab) rootOf(mount string) string {
	rest, found := strings.CutPrefix(mount, l.eng.DataRoot())
	m := mountedFor.FindStringSubmatch(rest)
	if !found || m == nil {
		return ""
	}
	return m[1] + m[2]
}

// initMount matches dockerd 20.10's mount point for the lower layer of a new container, used only
// while it fills the layer.
var initMount = regexp.MustCompile(`^/overlay2/[0-9a-f]{64}-init/merged$`)

// isLostInit reports whether a mount belongs to a container that dockerd was creating when it was
// killed. dockerd does not unmount it at its next start, and has no container for it.
func isLostInit(mount, dataRoot string, dockerdKilled bool) bool {
	rest, found := strings.CutPrefix(mount, dataRoot)
	return dockerdKilled && found && initMount.MatchString(rest)
}

// findLost finds the lost containers, and the removed ones.
func (l *lab) findLost(ctx context.Context) error {
	all, err := l.list()
	if err != nil {
		return err
	}

	l.shims.Lock()
	killed := maps.Clone(l.killed)
	l.shims.Unlock()

	lost := map[string]bool{}
	if len(killed) > 0 {
		known, err := l.knownContainers(ctx)
		if err != nil {
			return err
		}

		for id := range killed {
			if isLost(id, all, killed, known) {
				lost[id] = true
			}
		}
	}

	l.shims.Lock()
	defer l.shims.Unlock()

	l.lost = lost

	return nil
}

// isLost reports whether the engine had lost a container at the last call of findLost, and counts
// it.
func (l *lab) isLost(id string) bool {
	l.shims.Lock()
	defer l.shims.Unlock()
	if l.lost[id] {
		l.permitted[id] = true
	}
	return l.lost[id]
}

// knownContainers returns dockerd's listed containers, and the ones running in containerd.
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

// reportLost logs the permitted leftovers, with the engine's log lines about them.
func (l *lab) reportLost(t *testing.T) {
	t.Helper()
	l.shims.Lock()
	lost := slices.Sorted(maps.Keys(l.permitted))
	l.shims.Unlock()
	t.Logf("the engine has lost %d containers", len(lost))
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

// TestIsLostInit checks that the checker permits no other mount.
func TestIsLostInit(t *testing.T) {
	layer := "/data/overlay2/" + strings.Repeat("ab", 32)

	tests := map[string]bool{
		layer + "-init/merged":                          true,
		layer + "/merged":                               false,
		layer + "-init/merged/x":                        false,
		"/other/overlay2" + layer[14:] + "-init/merged": false,
	}

	for mount, want := range tests {
		t.Run(mount, func(t *testing.T) {
			if got := isLostInit(mount, "/data", true); got != want {
				t.Errorf("%s: %v", mount, got)
			}
			if isLostInit(mount, "/data", false) {
				t.Errorf("%s: although dockerd was not killed", mount)
			}
		})
	}
}

// TestIsLost checks that the checker permits only leftovers of containers that the engine has lost.
func TestIsLost(t *testing.T) {
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	shim := process{
		pid:     "10",
		parent:  "1",
		name:    "containerd-shim",
		cmdline: "/usr/bin/containerd-shim-runc-v2 -namespace moby -id " + id + " -address " + containerdSocket,
	}

	program := shim
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
		"its mounted root":                 {shim: program, killed: only(id), lost: true},
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
			if got := isLost(id, all, c.killed, c.known); got != c.lost {
				t.Errorf("lost %v, want %v", got, c.lost)
			}
		})
	}
}
