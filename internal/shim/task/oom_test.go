package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	eventtypes "github.com/containerd/containerd/api/events"
	coreevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/shim"
	"golang.org/x/sys/unix"
)

// record records the published events.
type record struct {
	shim.Publisher
	events []string
}

func (r *record) Publish(_ context.Context, topic string, event coreevents.Event) error {
	if topic != runtime.GetTopic(event) {
		return fmt.Errorf("topic %s of %T", topic, event)
	}
	r.events = append(r.events, fmt.Sprintf("%T", event))
	return nil
}

// TestOOMBeforeExit checks that each container that lost a process to the OOM killer has an event
// for it, and before that of its exit.
func TestOOMBeforeExit(t *testing.T) {
	const oom, exit = "*events.TaskOOM", "*events.TaskExit"
	for name, c := range map[string]struct {
		counters string
		send     []any
		want     []string
	}{
		"no kill": {"oom_kill 0\n", []any{&eventtypes.TaskExit{ContainerID: "a", ID: "a"}}, []string{exit}},
		"kill of cgroup v1": {
			"oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
			[]any{&eventtypes.TaskExit{ContainerID: "a", ID: "a"}},
			[]string{oom, exit},
		},
		"kill of cgroup v2": {
			"low 0\nmax 31\noom 1\noom_kill 2\noom_group_kill 0\n",
			[]any{&eventtypes.TaskExit{ContainerID: "a", ID: "a"}},
			[]string{oom, exit},
		},
		"runc's service was faster": {
			"oom_kill 1\n",
			[]any{&eventtypes.TaskOOM{ContainerID: "a"}, &eventtypes.TaskExit{ContainerID: "a", ID: "a"}},
			[]string{oom, exit},
		},
		"runc's service was slower": {
			"oom_kill 1\n",
			[]any{&eventtypes.TaskExit{ContainerID: "a", ID: "a"}, &eventtypes.TaskOOM{ContainerID: "a"}},
			[]string{oom, exit},
		},
		"two kills": {
			"oom_kill 2\n",
			[]any{&eventtypes.TaskOOM{ContainerID: "a"}, &eventtypes.TaskOOM{ContainerID: "a"}},
			[]string{oom, oom},
		},
		"exit of an exec": {"oom_kill 1\n", []any{&eventtypes.TaskExit{ContainerID: "a", ID: "x"}}, []string{exit}},
		"another one":     {"oom_kill 1\n", []any{&eventtypes.TaskExit{ContainerID: "b", ID: "b"}}, []string{exit}},
		"removed group":   {"", []any{&eventtypes.TaskExit{ContainerID: "a", ID: "a"}}, []string{exit}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "counters")
			if err := os.WriteFile(path, []byte(c.counters), 0o600); err != nil {
				t.Fatal(err)
			}

			file, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}

			r := &record{}
			p := NewPublisher(r)
			p.kills["a"] = &kills{counter: oomCounter{file: file}}
			for _, event := range c.send {
				if err := p.Publish(t.Context(), runtime.GetTopic(event), event); err != nil {
					t.Fatal(err)
				}
			}

			p.unwatch("a")
			if !slices.Equal(r.events, c.want) || len(p.kills) != 0 {
				t.Errorf("published %v, want %v", r.events, c.want)
			}
		})
	}
}

// TestWatchOwnGroup opens the counter of this process.
func TestWatchOwnGroup(t *testing.T) {
	p := NewPublisher(&record{})
	if err := p.watch("self", os.Getpid()); err != nil {
		t.Fatal(err)
	}

	text := make([]byte, maxCounters)
	n, _ := p.kills["self"].counter.file.ReadAt(text, 0)
	if n == 0 {
		t.Error("the counters of this process are empty")
	}

	p.unwatch("self")
}

// TestRemovedGroup verifies that an OOM kill in a removed control group of cgroup v1 is known, and
// that its removal alone is none.
func TestRemovedGroup(t *testing.T) {
	const hierarchy = "/sys/fs/cgroup/memory"
	if _, err := os.Stat(hierarchy + "/cgroup.event_control"); err != nil {
		t.Skip("cgroup v1 only")
	}

	for name, c := range map[string]struct {
		script string
		want   bool
	}{
		"kill":    {"x=x; while :; do x=$x$x; done", true},
		"no kill": {"exit 137", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(hierarchy, fmt.Sprintf("cri-dockerd-test-%d", os.Getpid()))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			defer os.Remove(dir)

			counter, err := openV1(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer counter.close()

			limit := os.WriteFile(filepath.Join(dir, "memory.limit_in_bytes"), []byte("16777216"), 0)
			_ = exec.Command("sh", "-c", "echo $$ > "+dir+"/cgroup.procs; "+c.script).Run() // it is killed
			if err := errors.Join(limit, os.Remove(dir)); err != nil {
				t.Fatal(err)
			}

			if _, err := countKills(counter.file); !errors.Is(err, unix.ENODEV) {
				t.Errorf("the counter of a removed control group: %v", err)
			}
			if got := counter.hasKills(); got != c.want {
				t.Errorf("hasKills = %v", got)
			}
		})
	}
}
