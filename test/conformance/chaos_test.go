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

// How much chaos; make chaos-net makes more of it than CI has time for.
var (
	chaosRounds = flag.Int("chaos-rounds", 2, "rounds of TestChaosNet")
	chaosPods   = flag.Int("chaos-pods", 10, "pods that TestChaosNet makes and removes at once")
)

// TestChaosNet makes and removes pods in parallel, as a kubelet does that tries again, while the
// daemon is killed with SIGKILL at random moments. After each round nothing of a network is left.
func TestChaosNet(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		seed := time.Now().UnixNano()
		c := chaos{node: n, random: rand.New(rand.NewPCG(uint64(seed), 0))}
		if err := c.life(t.Context(), "first", 19999); err != nil { // what all pods share comes with the first
			t.Fatal(err)
		}

		before := c.left(t)
		table := []string{"| round | kills | failed calls | seconds | " + strings.Join(kinds, " | ") + " |", "|" +
			strings.Repeat("---:|", 4+len(kinds))}
		for round := range *chaosRounds {
			began := time.Now()
			c.round(t, round)
			var left map[string][]string
			// recovery tries again after a minute what a dying plugin kept it from
			clean := within(2*time.Minute, func() bool {
				left = c.left(t)
				return fmt.Sprint(left) == fmt.Sprint(before)
			})

			row := fmt.Sprintf("| %d | %d | %d | %.0f |", round+1, c.kills, c.failures.Load(),
				time.Since(began).Seconds())
			for _, k := range kinds {
				row += fmt.Sprintf(" %d |", len(left[k])-len(before[k]))
			}

			table = append(table, row)
			if !clean {
				t.Errorf("round %d, seed %d: left %v, want %v", round+1, seed, left, before)
				break
			}
		}

		t.Logf("%s, what is left after each round:\n%s", n.eng.Version, strings.Join(table, "\n"))
	})
}

// kinds are what a pod's network may leave behind.
var kinds = []string{"containers", "sandboxes", "veths", "pins", "rules", "leases", "cache", "pending"}

type chaos struct {
	*node
	random   *rand.Rand
	kills    int // of this round
	failures atomic.Int64
}

// round makes and removes pods while the daemon is killed again and again.
func (c *chaos) round(t *testing.T, round int) {
	c.kills = 0
	c.failures.Store(0)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()

	var pods sync.WaitGroup
	for i := range *chaosPods {
		name := fmt.Sprintf("chaos-%d-%d", round, i)
		pods.Go(func() {
			if err := c.life(ctx, name, int32(20000+i)); err != nil {
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

// life makes a pod and removes it, as the kubelet does: what fails is tried again, with a new
// attempt when an old sandbox is there.
func (c *chaos) life(ctx context.Context, name string, port int32) error {
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
			}, {Protocol: runtimeapi.Protocol_UDP, ContainerPort: 53, HostPort: port},
		},
	}

	return c.again(ctx, func() error {
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

		return c.again(ctx, func() error { // from now on the pod is to go
			_, err := c.remove(ctx, cfg, func(*runtimeapi.PodSandbox) bool { return true })
			return err
		})
	})
}

// clear removes the pod's sandboxes that are not ready, and says whether one is.
func (c *chaos) clear(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (ready bool, err error) {
	return c.remove(ctx, cfg, func(p *runtimeapi.PodSandbox) bool {
		return p.State != runtimeapi.PodSandboxState_SANDBOX_READY
	})
}

// remove removes those of the pod's sandboxes that are to go, and says whether others are there.
func (c *chaos) remove(
	ctx context.Context, cfg *runtimeapi.PodSandboxConfig, goes func(*runtimeapi.PodSandbox) bool,
) (others bool, err error) {
	l, err := c.Runtime.ListPodSandbox(ctx,
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: cfg.Labels}})
	if err != nil {
		return false, err
	}

	for _, p := range l.Items {
		if !goes(p) {
			others = true
			continue
		}

		if _, err := c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return false, err
		}

		if _, err := c.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id}); err !=
			nil {
			return false, err
		}
	}

	return others, nil
}

// again tries until it succeeds or ctx ends.
func (c *chaos) again(ctx context.Context, try func() error) error {
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

// left is what there is of each kind.
func (c *chaos) left(t *testing.T) map[string][]string {
	t.Helper()
	left := map[string][]string{
		"containers": strings.Fields(c.docker(t, "ps", "-aq", "--filter", "label=io.kubernetes.docker.type")),
		"veths":      lines(c.run(t, "ip", "-o", "link", "show", "type", "veth"), ""),
		"rules":      lines(c.run(t, "iptables-save"), "CNI-"),
	}
	if l, err := c.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		left["sandboxes"] = []string{err.Error()}
	} else {
		for _, p := range l.Items {
			left["sandboxes"] = append(left["sandboxes"], p.Id)
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
				left[kind] = append(left[kind], filepath.Join(filepath.Base(dir), name))
			}
		}
	}

	return left
}

// lines are those of a text that hold a word.
func lines(text, word string) []string {
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(l string) bool {
		return l == "" || !strings.Contains(l, word)
	})
}
