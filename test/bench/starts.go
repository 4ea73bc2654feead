package main

import (
	"context"
	"flag"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// startsCommand runs the program as the benchmark of concurrent starts.
const startsCommand = "starts"

// startShare limits CreateContainer and StartContainer, as multiples of the engine's own calls.
const startShare = 1.05

// startsBench creates pods concurrently. Each has a container of the daemon, and a copy of it
// created and started by the engine alone in the same sandbox.
type startsBench struct {
	h      *harness
	e      *engines.Engine
	daemon *engines.Daemon
	docker *client.Client
	image  string
	atOnce int
}

// startsPod is a pod of one round.
type startsPod struct {
	cfg           *runtimeapi.PodSandboxConfig
	id, ours, own string
	copied        containerCopy
}

// containerCopy holds the engine's parameters to create a container.
type containerCopy struct {
	config *container.Config
	host   *container.HostConfig
}

// startTimes are the mean times of one round.
type startTimes struct{ create, start, engineCreate, engineStart time.Duration }

// benchStarts does one run for each engine and reports whether all limits hold.
func benchStarts(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(startsCommand, flag.ExitOnError)
	rounds := flags.Int("rounds", 25, "rounds")
	atOnce := flags.Int("at-once", 4, "pods in parallel")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		e := engines.Start(h, v)
		b := &startsBench{h: h, e: e, image: e.ImportBusybox(h), docker: e.Docker(h), atOnce: *atOnce}
		b.daemon = e.Daemon(h, "--log-level=info")
		fmt.Printf("Docker Engine %s, %d rounds of %d pods in parallel, %d CPUs, load average %s before the run, "+
			"%s\n\n", v, *rounds, *atOnce, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = b.run(ctx, *rounds) && ok
	}

	return ok
}

// run runs all rounds and prints the table.
func (b *startsBench) run(ctx context.Context, rounds int) bool {
	var times []startTimes
	calls := 0
	for i := range rounds + warmUp {
		before := b.engineCalls()
		t, err := b.round(ctx, i)
		if err != nil {
			b.h.Fatalf("bench: %v", err)
		}

		if i >= warmUp {
			times = append(times, t)
			calls += b.engineCalls() - before
		}
	}

	ok := true
	fmt.Println("| operation | p50 of the rounds' means | times the engine's own, median | limit | verdict |\n" +
		"|---|---:|---:|---|---|")
	row := func(op string, ours, own func(startTimes) time.Duration) {
		var a, b []time.Duration
		var shares []float64
		for _, t := range times {
			a, b = append(a, ours(t)), append(b, own(t))
			shares = append(shares, ours(t).Seconds()/own(t).Seconds())
		}

		slices.Sort(shares)
		share, verdict := shares[len(shares)/2], "pass"
		if share > startShare {
			ok, verdict = false, "FAIL"
		}

		fmt.Printf("| the engine's own %s | %s | | | |\n", strings.TrimSuffix(strings.ToLower(op), "container"),
			ms(quantile(b, 50)))
		fmt.Printf("| %s | %s | %.3f | ≤ %.2f | %s |\n", op, ms(quantile(a, 50)), share, startShare, verdict)
	}

	row("CreateContainer",
		func(t startTimes) time.Duration { return t.create },
		func(t startTimes) time.Duration { return t.engineCreate })
	row("StartContainer",
		func(t startTimes) time.Duration { return t.start },
		func(t startTimes) time.Duration { return t.engineStart })
	fmt.Printf("\nThe daemon sent %.1f requests to the engine per pod with one container.\n\n",
		float64(calls)/float64(rounds*b.atOnce))

	return ok
}

// round creates pods, measures both variants in turn, and removes everything.
func (b *startsBench) round(ctx context.Context, n int) (t startTimes, err error) {
	pods := make([]*startsPod, b.atOnce)
	for i := range pods {
		name := fmt.Sprintf("starts-%d-%d", n, i)
		pods[i] = &startsPod{cfg: &runtimeapi.PodSandboxConfig{
			Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
			LogDirectory: b.e.Dir + "/logs/" + name,
			Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: b.e.CgroupParent},
		}}
	}

	type step struct {
		do   func(context.Context, *startsPod) error
		into *time.Duration
	}

	var untimed time.Duration
	steps := []step{
		{b.runPod, &untimed},
		{b.create, &t.create},
		{b.start, &t.start},
		{b.inspect, &untimed},
		{b.copyContainer, &t.engineCreate},
		{b.startCopy, &t.engineStart},
		{b.remove, &untimed},
	}
	if n%2 == 1 { // the engine's own start first; it needs a container to copy
		steps = []step{steps[0], steps[1], steps[3], steps[4], steps[5], steps[2], steps[6]}
	}

	for _, s := range steps {
		if *s.into, err = b.forAllPods(ctx, pods, s.do); err != nil {
			return t, err
		}
	}

	return t, nil
}

// forAllPods runs one step for all pods concurrently and returns its mean time.
func (b *startsBench) forAllPods(
	ctx context.Context, pods []*startsPod, do func(context.Context, *startsPod) error,
) (time.Duration, error) {
	took := make([]time.Duration, len(pods))
	g, ctx := errgroup.WithContext(ctx)
	for i, p := range pods {
		g.Go(func() error {
			begin := time.Now()
			err := do(ctx, p)
			took[i] = time.Since(begin)
			return err
		})
	}

	err := g.Wait()
	var sum time.Duration
	for _, d := range took {
		sum += d
	}

	return sum / time.Duration(len(took)), err
}

func (b *startsBench) runPod(ctx context.Context, p *startsPod) error {
	r, err := b.daemon.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.cfg})
	p.id = r.GetPodSandboxId()
	return err
}

func (b *startsBench) create(ctx context.Context, p *startsPod) error {
	r, err := b.daemon.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  p.id,
		SandboxConfig: p.cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: b.image},
			Command:  []string{"sleep", "1000000"},
			LogPath:  "main.log",
		},
	})

	p.ours = r.GetContainerId()

	return err
}

func (b *startsBench) start(ctx context.Context, p *startsPod) error {
	_, err := b.daemon.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.ours})
	return err
}

func (b *startsBench) startCopy(ctx context.Context, p *startsPod) error {
	_, err := b.docker.ContainerStart(ctx, p.own, client.ContainerStartOptions{})
	return err
}

// inspect reads the configuration of the daemon's container. It removes the labels, because the
// daemon would adopt the copy.
func (b *startsBench) inspect(ctx context.Context, p *startsPod) error {
	in, err := b.docker.ContainerInspect(ctx, p.ours, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}

	p.copied = containerCopy{in.Container.Config, in.Container.HostConfig}
	p.copied.config.Labels = nil
	p.copied.config.Hostname, p.copied.config.Domainname = "", "" // the copy joins the sandbox and uses its names

	return nil
}

// copyContainer creates a copy of the daemon's container through the engine's API.
func (b *startsBench) copyContainer(ctx context.Context, p *startsPod) error {
	r, err := b.docker.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name:       "copy-" + p.cfg.Metadata.Name,
		Config:     p.copied.config,
		HostConfig: p.copied.host,
	})
	p.own = r.ID
	return err
}

// remove removes the pod and the copy.
func (b *startsBench) remove(ctx context.Context, p *startsPod) error {
	if _, err := b.docker.ContainerRemove(ctx, p.own, client.ContainerRemoveOptions{Force: true}); err != nil {
		return err
	}

	_, err := b.daemon.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id})
	if err != nil {
		return err
	}

	_, err = b.daemon.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id})

	return err
}

var engineRequest = regexp.MustCompile(`(?m)^cri_dockerd_engine_request_duration_seconds_count\{code="[^"]*",` +
	`operation="([^"]*)"\} (\d+)$`)

// engineCalls counts the daemon's requests to the engine so far, without the heartbeat and the
// check of events.
func (b *startsBench) engineCalls() (sum int) {
	for _, m := range engineRequest.FindAllStringSubmatch(b.daemon.Metrics(b.h), -1) {
		if !strings.HasSuffix(m[1], "/_ping") && m[1] != "GET /events" {
			n, _ := strconv.Atoi(m[2]) // digits alone
			sum += n
		}
	}
	return sum
}
