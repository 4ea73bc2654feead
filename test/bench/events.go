package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/lifecycle"
)

// eventsCommand runs the program as the benchmark of container events.
const eventsCommand = "events"

// eventsLimit is the limit of the 99th percentile of the delay behind the engine's event.
const eventsLimit = 20 * time.Millisecond

// benchEvents does one run for each engine and reports whether all limits hold.
func benchEvents(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(eventsCommand, flag.ExitOnError)
	count := flags.Int("lives", 1000, "containers to create, run and remove")
	atOnce := flags.Int("at-once", 1, "concurrent containers")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		f := events(ctx, h, v, *count, *atOnce)
		fmt.Printf("Docker Engine %s, %d container lives, %d at once, %d CPUs, load average %s before the run, %s\n\n",
			v, *count, *atOnce, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = reportEvents(os.Stdout, f, *count) && ok
	}

	return ok
}

func events(ctx context.Context, h *harness, v engines.Version, count, atOnce int) lifecycle.Result {
	e := engines.Start(h, v)
	image := e.ImportBusybox(h)
	d := e.Daemon(h, "--log-level=info")
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "lives", Namespace: "bench", Uid: "lives"},
		LogDirectory: e.Dir + "/logs",
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: e.CgroupParent},
	}

	pod, err := d.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	f, err := lifecycle.Run(ctx, lifecycle.Config{
		Runtime:    d.Runtime,
		Docker:     e.Docker(h),
		Pod:        pod.PodSandboxId,
		PodOf:      cfg,
		Containers: count,
		AtOnce:     atOnce,
		Container: func(name string, command []string) *runtimeapi.ContainerConfig {
			return &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: name},
				Image:    &runtimeapi.ImageSpec{Image: image},
				Command:  command,
				LogPath:  name + ".log",
			}
		},
	})
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	return f
}

// reportEvents prints the results as a Markdown table and reports whether the limits hold.
func reportEvents(out io.Writer, f lifecycle.Result, count int) bool {
	ok := true
	verdict := func(good bool) string {
		ok = ok && good
		if good {
			return "pass"
		}
		return "FAIL"
	}

	fmt.Fprintln(out, "| delay behind the engine's event | p50 | p99 | max | n | limit | verdict |\n"+
		"|---|---:|---:|---:|---:|---|---|")
	var all []time.Duration
	row := func(name string, d []time.Duration, limit, verdict string) {
		fmt.Fprintf(out, "| %s | %s | %s | %s | %d | %s | %s |\n", name, ms(quantile(d, 50)), ms(quantile(d, 99)),
			ms(quantile(d, 100)), len(d), limit, verdict)
	}

	for kind := range runtimeapi.ContainerEventType(len(runtimeapi.ContainerEventType_name)) {
		name := strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(kind.String(), "CONTAINER_"), "_EVENT"))
		row(name, f.Latency[kind], "", "")
		all = append(all, f.Latency[kind]...)
	}

	row("all", all, "p99 ≤ "+ms(eventsLimit), verdict(len(all) == 4*count && quantile(all, 99) <= eventsLimit))
	fmt.Fprintf(out, "| containers with missing, duplicate or unordered events | %d | | | %d | none | %s |\n\n",
		len(f.Unexpected), count, verdict(len(f.Unexpected) == 0))
	for _, w := range f.Unexpected[:min(len(f.Unexpected), 10)] {
		fmt.Fprintln(out, w)
	}

	return ok
}
