package conformance

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Flags for the size of TestChaosNet; make chaos-net runs more rounds than CI has time for.
var (
	chaosRounds = flag.Int("chaos-rounds", 2, "number of rounds of TestChaosNet")
	chaosPods   = flag.Int("chaos-pods", 10, "number of pods per round of TestChaosNet")
)

// TestChaosNet creates and removes pods in parallel with retries, like a kubelet, while the daemon
// is killed with SIGKILL at random times. After each round no network state remains.
func TestChaosNet(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		seed := time.Now().UnixNano()
		c := chaos{node: n, random: rand.New(rand.NewPCG(uint64(seed), 0))}
		if err := c.runAndRemove(t.Context(), "first", 19999); err != nil { // creates the state shared by all pods
			t.Fatal(err)
		}

		before := c.networkState(t)
		table := []string{
			"| round | kills | failed calls | seconds | " + strings.Join(kinds, " | ") + " |",
			"|" + strings.Repeat("---:|", 4+len(kinds)),
		}
		for round := range *chaosRounds {
			began := time.Now()
			c.round(t, round)
			var remaining map[string][]string
			// Recovery retries after a minute if a dying plugin caused a failure.
			clean := within(2*time.Minute, func() bool {
				remaining = c.networkState(t)
				return fmt.Sprint(remaining) == fmt.Sprint(before)
			})

			row := fmt.Sprintf("| %d | %d | %d | %.0f |", round+1, c.kills, c.failures.Load(),
				time.Since(began).Seconds())
			for _, k := range kinds {
				row += fmt.Sprintf(" %d |", len(remaining[k])-len(before[k]))
			}

			table = append(table, row)
			if !clean {
				t.Errorf("round %d, seed %d: remaining state %v, want %v", round+1, seed, remaining, before)
				break
			}
		}

		t.Logf("%s, state after each round minus state before:\n%s", n.eng.Version, strings.Join(table, "\n"))
	})
}

// kinds names the kinds of network state a pod can leave behind.
var kinds = []string{"containers", "sandboxes", "veths", "pins", "rules", "leases", "cache", "pending"}

type chaos struct {
	*node
	random   *rand.Rand
	kills    int // of this round
	failures atomic.Int64
}

// round creates and removes pods while the daemon is killed repeatedly.
func (c *chaos) round(t *testing.T, round int) {
	c.kills = 0
	c.failures.Store(0)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()

	var pods sync.WaitGroup
	for i := range *chaosPods {
		name := fmt.Sprintf("chaos-%d-%d", round, i)
		pods.Go(func() {
			if err := c.runAndRemove(ctx, name, int32(20000+i)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}

	done := make(chan struct{})
	go func() { pods.Wait(); close(done) }()
	for {
		select {
		case <-done:
			return
		case <-time.After(time.Duration(100+c.random.IntN(3000)) * time.Millisecond):
			c.Kill(t)
			c.Restart(t)
			c.kills++
		}
	}
}

// runAndRemove creates and removes a pod. Like the kubelet, it retries failures and uses a new
// attempt number if an old sandbox exists.
func (c *chaos) runAndRemove(ctx context.Context, name string, port int32) error {
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "chaos", Uid: name},
		Hostname: name,
		Labels:   map[string]string{"io.kubernetes.pod.uid": name},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{CgroupParent: c.eng.CgroupParent},
		PortMappings: []*runtimeapi.PortMapping{
			{
				Protocol:      runtimeapi.Protocol_TCP,
				ContainerPort: 80,
				HostPort:      port,
			},
			{
				Protocol:      runtimeapi.Protocol_UDP,
				ContainerPort: 53,
				HostPort:      port,
			},
		},
	}

	return c.retry(ctx, func() error {
		ready, err := c.clear(ctx, cfg)
		if err != nil {
			return err
		}

		if !ready {
			if _, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}); err != nil {
				cfg.Metadata.Attempt++
				return err
			}
		}

		return c.retry(ctx, func() error {
			_, err := c.remove(ctx, cfg, func(*runtimeapi.PodSandbox) bool { return true })
			return err
		})
	})
}

// clear removes the pod's sandboxes that are not ready and reports whether a ready one exists.
func (c *chaos) clear(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (ready bool, err error) {
	return c.remove(ctx, cfg, func(p *runtimeapi.PodSandbox) bool {
		return p.State != runtimeapi.PodSandboxState_SANDBOX_READY
	})
}

// remove removes the matching sandboxes of a pod and reports whether others exist.
func (c *chaos) remove(
	ctx context.Context, cfg *runtimeapi.PodSandboxConfig, matches func(*runtimeapi.PodSandbox) bool,
) (others bool, err error) {
	l, err := c.Runtime.ListPodSandbox(ctx,
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: cfg.Labels}})
	if err != nil {
		return false, err
	}

	for _, p := range l.Items {
		if !matches(p) {
			others = true
			continue
		}

		if _, err := c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return false, err
		}

		if _, err := c.Runtime.RemovePodSandbox(ctx,
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return false, err
		}
	}

	return others, nil
}

// retry calls try until it succeeds or ctx ends.
func (c *chaos) retry(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}

		c.failures.Add(1)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// networkState returns the existing state of each kind.
func (c *chaos) networkState(t *testing.T) map[string][]string {
	t.Helper()
	state := map[string][]string{
		"containers": strings.Fields(c.docker(t, "ps", "-aq", "--filter", "label=io.kubernetes.docker.type")),
		"veths":      lines(c.run(t, "ip", "-o", "link", "show", "type", "veth"), ""),
		"rules":      lines(c.run(t, "iptables-save"), "CNI-"),
	}
	if l, err := c.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		state["sandboxes"] = []string{err.Error()}
	} else {
		for _, p := range l.Items {
			state["sandboxes"] = append(state["sandboxes"], p.Id)
		}
	}

	for kind, dir := range map[string]string{
		"pins":    c.PinDir,
		"leases":  filepath.Join(c.LeaseDir, "kubenet"),
		"cache":   c.CacheDir,
		"pending": c.PendingDir,
	} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}

		for _, e := range entries {
			if name := e.Name(); name != "lock" && !strings.HasPrefix(name, "last_reserved_ip") {
				state[kind] = append(state[kind], filepath.Join(filepath.Base(dir), name))
			}
		}
	}

	return state
}

// lines returns the lines of a text that contain a word.
func lines(text, word string) []string {
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(l string) bool {
		return l == "" || !strings.Contains(l, word)
	})
}
