package main

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/test/engines"
)

// shimCommand runs the program as the benchmark of the containerd shim.
const shimCommand = "shim"

// shimBench compares pods under the engine's default runtime and under the containerd shim.
type shimBench struct {
	h      *harness
	e      *engines.Engine
	daemon *engines.Daemon
	docker *client.Client
	image  string
}

// benchShim does one run for each engine with annotations, and reports whether the shim is faster.
func benchShim(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(shimCommand, flag.ExitOnError)
	rounds := flags.Int("rounds", 10, "rounds of ten pods with each runtime")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	return eachShimBench(h, *rounds, func(b *shimBench) bool { return b.run(ctx, *rounds) })
}

// eachShimBench runs a benchmark for each engine with annotations, with these arguments of the
// daemon, and reports whether all succeed.
func eachShimBench(h *harness, rounds int, run func(*shimBench) bool, args ...string) bool {
	ok := true
	for _, v := range engines.Versions() {
		if v == engines.V20 {
			continue
		}

		load := loadAverage(h)
		e := engines.Start(h, v)
		b := &shimBench{h: h, e: e, image: e.ImportBusybox(h), docker: e.Docker(h)}
		b.daemon = e.Daemon(h, append([]string{"--log-level=info"}, args...)...)
		fmt.Printf("Docker Engine %s, %d rounds of ten pods with each runtime, %d CPUs, load average %s before the "+
			"run, %s\n\n", v, rounds, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = run(b) && ok
	}

	return ok
}

const (
	startOfPause operation = "start of a pause by the engine"
	threeCalls   operation = "the three together"
)

// podOperations are the rows of the table, in its order.
var podOperations = []operation{
	"RunPodSandbox", "CreateContainer", "StartContainer", threeCalls, "StopPodSandbox", "RemovePodSandbox",
}

// run runs all rounds and prints the table. The runtimes alternate, so that noise meets both.
func (b *shimBench) run(ctx context.Context, rounds int) bool {
	const podsPerRound = 10
	modes := []string{"engine", "shim"}
	times := map[string]map[operation][]time.Duration{"engine": {}, "shim": {}}
	for i := range rounds {
		for _, mode := range modes {
			b.daemon.Change(b.h, "--log-level=info", "--containers="+mode)
			b.daemon.AwaitReady(b.h)
			for j := range podsPerRound + warmUp {
				name := fmt.Sprintf("%s-%d-%d", mode, i, j)
				took, err := b.pod(ctx, name, mode)
				if err != nil {
					b.h.Fatalf("bench: pod %s: %v", name, err)
				}

				for op, d := range took {
					if j >= warmUp {
						times[mode][op] = append(times[mode][op], d)
					}
				}
			}
		}
	}

	fmt.Println("| operation, p50 | engine | shim | ratio |\n|---|---:|---:|---:|")
	for _, op := range append([]operation{startOfPause}, podOperations...) {
		engine, shim := quantile(times["engine"][op], 50), quantile(times["shim"][op], 50)
		fmt.Printf("| %s | %s | %s | %.2f |\n", op, ms(engine), ms(shim), shim.Seconds()/engine.Seconds())
	}

	fmt.Println()

	return quantile(times["shim"][threeCalls], 50) < quantile(times["engine"][threeCalls], 50)
}

// pod runs and removes a pod with one container, and starts a pause beside it.
func (b *shimBench) pod(ctx context.Context, name, mode string) (map[operation]time.Duration, error) {
	took, err := timePod(ctx, b.daemon.Runtime, b.image, b.podConfig(name))
	if err == nil {
		took[startOfPause] = b.startPause(ctx, mode)
	}

	return took, err
}

func (b *shimBench) podConfig(name string) *runtimeapi.PodSandboxConfig {
	cfg := podConfig(name)
	cfg.Linux.CgroupParent = b.e.CgroupParent + "/" + name
	return cfg
}

// timePod runs and removes a pod with one container, and returns the time of each call. It passes
// the begin and the end of each call to observers.
func timePod(
	ctx context.Context, runtime runtimeapi.RuntimeServiceClient, image string, cfg *runtimeapi.PodSandboxConfig,
	observers ...func(op operation, begin, end time.Time),
) (map[operation]time.Duration, error) {
	took := map[operation]time.Duration{}
	timed := func(op operation, do func() error) error {
		begin := time.Now()
		err := do()
		end := time.Now()
		took[op] = end.Sub(begin)
		for _, observe := range observers {
			observe(op, begin, end)
		}
		return err
	}

	var pod, id string
	for _, step := range []struct {
		op operation
		do func() error
	}{
		{"RunPodSandbox", func() error {
			r, err := runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
			pod = r.GetPodSandboxId()
			return err
		}},
		{"CreateContainer", func() error {
			r, err := runtime.CreateContainer(ctx, sleeper(pod, image, cfg))
			id = r.GetContainerId()
			return err
		}},
		{"StartContainer", func() error {
			_, err := runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}},
		{"StopPodSandbox", func() error {
			_, err := runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}},
		{"RemovePodSandbox", func() error {
			_, err := runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		}},
	} {
		if err := timed(step.op, step.do); err != nil {
			return nil, fmt.Errorf("%s: %w", step.op, err)
		}
	}

	took[threeCalls] = took["RunPodSandbox"] + took["CreateContainer"] + took["StartContainer"]

	return took, nil
}

// sleeper is the request for a container that sleeps.
func sleeper(pod, image string, cfg *runtimeapi.PodSandboxConfig) *runtimeapi.CreateContainerRequest {
	return &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: image},
			Command:  []string{"sleep", "100000"},
		},
		SandboxConfig: cfg,
	}
}

// startPause starts a pause through the engine's API alone and returns the time of the start. The
// engine's runtime compiles the profile of the pause image, and so does the shim.
func (b *shimBench) startPause(ctx context.Context, mode string) time.Duration {
	host := &container.HostConfig{
		NetworkMode: "host",
		LogConfig:   container.LogConfig{Type: "none"},
		SecurityOpt: []string{"no-new-privileges", "seccomp=" + pause.Seccomp},
		CapDrop:     []string{"ALL"},
		Resources:   container.Resources{CgroupParent: b.e.CgroupParent},
	}
	if mode == "shim" {
		text, err := annotation.Container{Sandbox: &annotation.Sandbox{}}.Encode()
		if err != nil {
			b.h.Fatalf("bench: %v", err)
		}
		host.Runtime, host.Annotations = annotation.Runtime, map[string]string{annotation.Key: text}
	}

	img, err := pause.New(runtime.GOARCH)
	if err != nil {
		b.h.Fatalf("bench: %v", err)
	}

	c, err := b.docker.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config:     &container.Config{Image: img.Ref},
		HostConfig: host,
	})
	if err != nil {
		b.h.Fatalf("bench: create: %v", err)
	}

	begin := time.Now()
	_, err = b.docker.ContainerStart(ctx, c.ID, client.ContainerStartOptions{})
	took := time.Since(begin)
	if err != nil {
		b.h.Fatalf("bench: start: %v", err)
	}

	if _, err := b.docker.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true}); err != nil {
		b.h.Fatalf("bench: remove: %v", err)
	}

	return took
}
