package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/peer"
)

// containerdCommand runs the program as the benchmark beside containerd's own CRI.
const containerdCommand = "containerd"

// Limits relative to containerd's CRI, and of the pause to its start by runc.
const (
	threeCallsShare = 0.75
	stopShare       = 0.7
	manyPodsShare   = 0.85
	shimMemoryShare = 1.0
	pauseShare      = 0.4
)

// manyPodsAtOnce is the number of pods that start at the same time.
const manyPodsAtOnce = 4

// containerdBench compares pods under the containerd shim with those of containerd's CRI, in the
// same namespaces.
type containerdBench struct {
	*shimBench
	peer *peer.Peer
	ok   bool // all limits hold
}

// side is one of the compared runtimes.
type side struct {
	name    string
	runtime runtimeapi.RuntimeServiceClient
	image   string
	shim    string // containerd's namespace, an argument in the command lines of its shims

	containerd string // socket of its containerd
}

// benchContainerd does one run for each engine with annotations, and reports whether all limits
// hold.
func benchContainerd(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(containerdCommand, flag.ExitOnError)
	rounds := flags.Int("rounds", 10, "rounds of ten pods with each runtime")
	traces := flags.Int("traced", 20, "pods of each runtime whose steps are printed")
	pods := flags.Int("pods", 100, "pods that start in parallel, 0 to skip this measurement")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	return eachShimBench(h, *rounds, func(shim *shimBench) bool {
		b := &containerdBench{shimBench: shim, peer: peer.Start(ctx, h, shim.e), ok: true}
		b.measureCalls(ctx, *rounds)
		b.measurePause(ctx, *rounds)
		b.trace(ctx, *traces)
		if *pods > 0 {
			b.measureManyPods(ctx, *pods)
		}

		return b.ok
	}, "--containers=shim")
}

// sides returns the compared runtimes, containerd first.
func (b *containerdBench) sides() [2]side {
	return [2]side{
		{"containerd", b.peer.Runtime, b.peer.Busybox, "k8s.io", b.peer.Socket},
		{"cri-dockerd", b.daemon.Runtime, b.image, "moby", b.e.Path("/run/docker/containerd/containerd.sock")},
	}
}

// row prints a row of a table. A limit of 0 is none.
func (b *containerdBench) row(name, theirs, ours string, share, limit float64) {
	text, verdict := "", ""
	if limit > 0 {
		text, verdict = fmt.Sprintf("≤ %.2f", limit), "pass"
		if share > limit {
			verdict, b.ok = "FAIL", false
		}
	}

	fmt.Printf("| %s | %s | %s | %.2f | %s | %s |\n", name, theirs, ours, share, text, verdict)
}

// measureCalls measures one pod at a time. The runtimes alternate, so that noise meets both.
func (b *containerdBench) measureCalls(ctx context.Context, rounds int) {
	const podsPerRound = 10
	var times [2]map[operation][]time.Duration
	for s := range times {
		times[s] = map[operation][]time.Duration{}
	}

	for i := range rounds*podsPerRound + warmUp {
		for s, one := range b.sides() {
			took, err := timePod(ctx, one.runtime, one.image, b.podConfig(fmt.Sprintf("%s-%d", one.name, i)))
			if err != nil {
				b.h.Fatalf("bench: %s: %v", one.name, err)
			}

			for op, d := range took {
				if i >= warmUp {
					times[s][op] = append(times[s][op], d)
				}
			}
		}
	}

	fmt.Println("| operation, p50 | containerd | cri-dockerd | ratio | limit | verdict |\n|---|---:|---:|---:|---|---|")
	limits := map[operation]float64{threeCalls: threeCallsShare, "StopPodSandbox": stopShare}
	for _, op := range podOperations {
		theirs, ours := quantile(times[0][op], 50), quantile(times[1][op], 50)
		b.row(string(op), ms(theirs), ms(ours), ours.Seconds()/theirs.Seconds(), limits[op])
	}

	fmt.Println()
}

// measurePause compares the start of a pause by runc with that by the shim, both through the
// engine's API.
func (b *containerdBench) measurePause(ctx context.Context, rounds int) {
	var runc, shim []time.Duration
	for range 2 * rounds {
		runc = append(runc, b.startPause(ctx, "engine"))
		shim = append(shim, b.startPause(ctx, "shim"))
	}

	theirs, ours := quantile(runc, 50), quantile(shim, 50)
	fmt.Println("| operation, p50 | runc | shim | ratio | limit | verdict |\n|---|---:|---:|---:|---|---|")
	b.row(string(startOfPause), ms(theirs), ms(ours), ours.Seconds()/theirs.Seconds(), pauseShare)
	fmt.Println()
}

// measureManyPods starts pods in parallel, twice with each runtime, and measures the private memory
// of the shims of all pods.
func (b *containerdBench) measureManyPods(ctx context.Context, pods int) {
	var times [2][]time.Duration
	var memory [2]int64
	for i := range 2 {
		for s, one := range b.sides() {
			begin := time.Now()
			ids := b.startPods(ctx, one, fmt.Sprintf("many-%d", i), pods)
			times[s] = append(times[s], time.Since(begin))
			memory[s] = b.shimMemory(one.shim)
			b.removePods(ctx, one, ids)
		}
	}

	fmt.Println("| many pods | containerd | cri-dockerd | ratio | limit | verdict |\n|---|---:|---:|---:|---|---|")
	theirs, ours := quantile(times[0], 50), quantile(times[1], 50)
	name := fmt.Sprintf("%d pods, %d at a time", pods, manyPodsAtOnce)
	b.row(name, ms(theirs), ms(ours), ours.Seconds()/theirs.Seconds(), manyPodsShare)
	mib := func(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
	b.row("private memory of their shims", mib(memory[0]), mib(memory[1]), float64(memory[1])/float64(memory[0]),
		shimMemoryShare)
	fmt.Println()
}

// startPods starts pods with one container each and returns their IDs.
func (b *containerdBench) startPods(ctx context.Context, s side, name string, pods int) []string {
	ids := make([]string, pods)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(manyPodsAtOnce)
	for i := range pods {
		g.Go(func() (err error) {
			ids[i], err = s.startPod(ctx, b.podConfig(fmt.Sprintf("%s-%s-%d", s.name, name, i)))
			return err
		})
	}

	if err := g.Wait(); err != nil {
		b.h.Fatalf("bench: %s: %v", s.name, err)
	}

	return ids
}

func (s side) startPod(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (string, error) {
	p, err := s.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return "", err
	}

	c, err := s.runtime.CreateContainer(ctx, sleeper(p.PodSandboxId, s.image, cfg))
	if err == nil {
		_, err = s.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	}

	return p.PodSandboxId, err
}

func (b *containerdBench) removePods(ctx context.Context, s side, ids []string) {
	for _, id := range ids {
		_, err := s.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
		if err == nil {
			_, err = s.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
		}
		if err != nil {
			b.h.Fatalf("bench: %s: %v", s.name, err)
		}
	}
}

// shimMemory returns the private memory in bytes of all shims of a containerd namespace that belong
// to this engine or its peer.
func (b *containerdBench) shimMemory(namespace string) (sum int64) {
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.h.Fatalf("bench: %v", err)
	}

	for _, file := range processes {
		text, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(text, []byte(b.e.Dir+"/")) ||
			!bytes.Contains(text, []byte("-namespace\x00"+namespace+"\x00")) {
			continue
		}

		n, err := privateMemory(filepath.Join(filepath.Dir(file), "smaps_rollup"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			b.h.Fatalf("bench: %v", err)
		}
		sum += n
	}

	if sum == 0 {
		b.h.Fatalf("bench: no shim of the namespace %s was found", namespace)
	}

	return sum
}

// privateMemory returns the sum of the private pages in a file of proc(5), in bytes.
func privateMemory(file string) (sum int64, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}

	for line := range strings.Lines(string(text)) {
		name, rest, _ := strings.Cut(line, ":")
		if !strings.HasPrefix(name, "Private_") {
			continue
		}

		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += kib << 10
	}

	return sum, nil
}
