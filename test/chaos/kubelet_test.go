package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubelet drives a lab like a kubelet: desired pods with retrying sync loops, garbage collection,
// exec probes, statistics, events.
type kubelet struct {
	*lab
	slots    int
	random   func(worker uint64) *rand.Rand
	freeze   chan struct{} // closed when pods must stay
	deletion chan struct{} // closed when all pods must be removed

	mu         sync.Mutex // guards the fields below
	pods       map[int]*pod
	ended      []*pod
	ok, failed map[string]int // calls by method
	errors     map[string]int // by method and beginning of the message
	violations []string
	// container IDs by the pod's UID, a space, and the name of its state file
	ids     map[string]string
	removed time.Time // last removal of a container by someone else
}

// Timeouts of calls. The kubelet's own is two minutes. Faults of a few seconds should sometimes
// last longer than these.
const (
	callTimeout = 20 * time.Second
	execTimeout = 5 * time.Second
	callSlack   = 5 * time.Second // tolerance beyond the deadline, for a loaded machine
	syncEvery   = 300 * time.Millisecond
)

func newKubelet(l *lab, slots int, seed uint64) *kubelet {
	return &kubelet{
		lab:      l,
		slots:    slots,
		random:   func(worker uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, worker)) },
		freeze:   make(chan struct{}),
		deletion: make(chan struct{}),
		pods:     map[int]*pod{},
		ok:       map[string]int{},
		failed:   map[string]int{},
		errors:   map[string]int{},
		ids:      map[string]string{},
	}
}

// Worker indexes of a kubelet. Each worker has its own random numbers; pods come after them.
const (
	probeWorker uint64 = iota + 1
	statsWorker
	firstPodWorker
)

// drive runs pods until ctx ends, or until all are removed after the start of the deletion.
func (k *kubelet) drive(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	var pods, others sync.WaitGroup
	for slot := range k.slots {
		pods.Go(func() { k.runSlot(ctx, slot) })
	}

	others.Go(func() { k.probe(ctx) })
	others.Go(func() { k.observe(ctx) })
	others.Go(func() { k.follow(ctx) })
	pods.Wait()
	cancel()
	others.Wait()
}

// runSlot runs one pod after the other.
func (k *kubelet) runSlot(ctx context.Context, slot int) {
	random := k.random(firstPodWorker + uint64(slot))
	for generation := 0; ctx.Err() == nil && !closed(k.deletion); generation++ {
		p := newPod(k, slot, generation, random)
		k.mu.Lock()
		k.pods[slot] = p
		k.mu.Unlock()

		p.runFor(ctx, time.Duration(5+random.IntN(35))*time.Second)

		k.mu.Lock()
		delete(k.pods, slot)
		k.ended = append(k.ended, p)
		k.mu.Unlock()
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// desired returns the pods to run.
func (k *kubelet) desired() []*pod {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.SortedFunc(maps.Values(k.pods), func(a, b *pod) int { return a.slot - b.slot })
}

// all returns every pod so far.
func (k *kubelet) all() []*pod {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Concat(k.ended, slices.Collect(maps.Values(k.pods)))
}

func (k *kubelet) violate(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.violations = append(k.violations, time.Now().Format(time.StampMilli)+" "+fmt.Sprintf(format, args...))
}

// call makes a call with a deadline, counts it, and checks the deadline.
func (k *kubelet) call(
	ctx context.Context, method string, timeout time.Duration, do func(context.Context) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	began := time.Now()
	err := do(ctx)
	if took := time.Since(began); took > timeout+callSlack {
		k.violate("%s took %s, its deadline was %s: %v", method, took, timeout, err)
	}

	k.mu.Lock()
	defer k.mu.Unlock()

	if err == nil {
		k.ok[method]++
		return nil
	}

	k.failed[method]++
	k.errors[method+": "+shorten(err)]++

	return fmt.Errorf("%s: %w", method, err)
}

// mustExist checks that the engine has a container that the daemon has just reported as running.
func (k *kubelet) mustExist(ctx context.Context, method, id string) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()

	_, err := k.docker.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	k.mu.Lock()
	recently := time.Since(k.removed) < time.Minute
	k.mu.Unlock()
	if errdefs.IsNotFound(err) && !recently {
		k.violate("%s succeeded for %s, but the engine does not have it", method, id)
	}
}

// shorten removes object-specific parts from an error's message.
func shorten(err error) string {
	text := inText.ReplaceAllString(err.Error(), "…")
	return text[:min(len(text), 240)]
}

// sleep waits, and reports whether ctx is still active.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// probe runs exec probes in running containers.
func (k *kubelet) probe(ctx context.Context) {
	random := k.random(probeWorker)
	for i := 0; sleep(ctx, time.Duration(100+random.IntN(300))*time.Millisecond); i++ {
		var running []string
		err := k.call(ctx, "ListContainers", callTimeout, func(ctx context.Context) error {
			state := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
			l, err := k.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
				Filter: &runtimeapi.ContainerFilter{State: state},
			})
			for _, c := range l.GetContainers() {
				running = append(running, c.Id)
			}

			return err
		})
		if err != nil || len(running) == 0 {
			continue
		}

		k.exec(ctx, running[random.IntN(len(running))], fmt.Sprint("probe ", i))
	}
}

// exec runs a probe in a container. Unless it fails, its output and exit code must be correct.
func (k *kubelet) exec(ctx context.Context, id, word string) {
	_ = k.call(ctx, "ExecSync", execTimeout+callTimeout, func(ctx context.Context) error {
		r, err := k.daemon.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"echo", word},
			Timeout:     int64(execTimeout / time.Second),
		})
		if err == nil && r.ExitCode == 0 && strings.TrimSpace(string(r.Stdout)) != word {
			k.violate("ExecSync in %s returned %q, want %q", id, r.Stdout, word)
		}

		return err
	})
}

// observe reads statistics and lists, in one response and as streams.
func (k *kubelet) observe(ctx context.Context) {
	r, random := k.daemon.Runtime, k.random(statsWorker)
	calls := []struct {
		name string
		do   func(context.Context) error
	}{
		{"ListContainerStats", func(ctx context.Context) error {
			_, err := r.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return err
		}},
		{"ListPodSandboxStats", func(ctx context.Context) error {
			_, err := r.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return err
		}},
		{"StreamContainerStats", func(ctx context.Context) error {
			s, err := r.StreamContainerStats(ctx, &runtimeapi.StreamContainerStatsRequest{})
			return drain(s, err)
		}},
		{"StreamContainers", func(ctx context.Context) error {
			s, err := r.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
			return drain(s, err)
		}},
		{"StreamPodSandboxes", func(ctx context.Context) error {
			s, err := r.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
			return drain(s, err)
		}},
		{"Status", func(ctx context.Context) error {
			_, err := r.Status(ctx, &runtimeapi.StatusRequest{})
			return err
		}},
		{"ListImages", func(ctx context.Context) error {
			_, err := k.daemon.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
			return err
		}},
		{"ImageFsInfo", func(ctx context.Context) error {
			_, err := k.daemon.Image.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
			return err
		}},
	}

	for sleep(ctx, time.Duration(50+random.IntN(200))*time.Millisecond) {
		c := calls[random.IntN(len(calls))]
		_ = k.call(ctx, c.name, callTimeout, c.do)
	}
}

// drain reads a stream to its end.
func drain[T any](s interface{ Recv() (T, error) }, err error) error {
	for err == nil {
		_, err = s.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// follow reads the events of containers, and reconnects after the daemon has restarted.
func (k *kubelet) follow(ctx context.Context) {
	for sleep(ctx, syncEvery) {
		s, err := k.daemon.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		_ = drain(s, err)
	}
}
