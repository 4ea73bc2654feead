package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/lifecycle"
)

// churnCommand runs the program as the benchmark of many short-lived pods.
const churnCommand = "churn"

const (
	// churnWarmUp is the number of pods before the first reading. By then all one-time allocations
	// must exist, and so must the pages of the program itself. They count as resident, and one of
	// its 18 MiB is first used somewhere among the first hundreds of pods.
	churnWarmUp = 500
	churnMore   = 1.1 // limit of the daemon's resources afterwards, as a multiple of those before
)

// churnResults are the daemon's resources before and after the pods.
type churnResults struct {
	before, after lifecycle.Usage
	pods          int
	took          time.Duration
}

// benchChurn does one run and reports whether all limits hold.
func benchChurn(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(churnCommand, flag.ExitOnError)
	pods := flags.Int("pods", 10000, "pods to create and remove, with one container each")
	atOnce := flags.Int("at-once", 4, "concurrent pods")
	longest := flags.Duration("for", 24*time.Hour, "start no more pods after this time")
	settle := flags.Duration("settle", 3*time.Minute, "idle time before each reading: Go releases memory slowly")
	version := flags.String("engine", string(engines.V20), "engine: 20.10 or 29")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	load := loadAverage(h)
	f := churn(ctx, h, engines.Version(*version), *pods, *atOnce, *longest, *settle)
	fmt.Printf("Docker Engine %s, %d pods with one container each, %d at once, in %s, %d CPUs, load average %s "+
		"before the run, %s\n\n",
		*version, f.pods, *atOnce, f.took.Round(time.Second), runtime.NumCPU(), load,
		time.Now().UTC().Format(time.DateOnly))

	return reportChurn(os.Stdout, f)
}

func churn(
	ctx context.Context, h *harness, v engines.Version, pods, atOnce int, longest, settle time.Duration,
) churnResults {
	e := engines.Start(h, v)
	image := e.ImportBusybox(h)
	d := e.Daemon(h, "--log-level=info")
	c := &lifecycle.Churn{
		Runtime: d.Runtime,
		Pods:    churnWarmUp,
		AtOnce:  atOnce,
		Pod: func(i int) *runtimeapi.PodSandboxConfig {
			name := fmt.Sprint("churn-", i)
			return &runtimeapi.PodSandboxConfig{
				Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
				LogDirectory: e.Dir + "/logs/" + name,
				Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: e.CgroupParent},
			}
		},
		Container: func(name string, command []string) *runtimeapi.ContainerConfig {
			return &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: name},
				Image:    &runtimeapi.ImageSpec{Image: image},
				Command:  command,
				LogPath:  name + ".log",
			}
		},
	}

	held := func() lifecycle.Usage {
		s, err := lifecycle.ReadUsage(d.Metrics(h))
		if err != nil {
			h.Fatalf("bench: %v", err)
		}
		return s
	}

	run := func(ctx context.Context) int {
		n, err := c.Run(ctx)
		if err != nil {
			h.Fatalf("bench: %v", err)
		}
		return n
	}

	run(ctx)
	idle(ctx, h, settle)
	f := churnResults{before: held()}
	c.Pods = pods
	c.Done = func(n int) {
		if n%500 == 0 {
			h.Logf("%s: %d pods, %+v", time.Now().Format(time.TimeOnly), n, held())
		}
	}

	limited, cancel := context.WithTimeout(ctx, longest)
	defer cancel()

	begin := time.Now()
	f.pods = run(limited)
	f.took = time.Since(begin)
	idle(ctx, h, settle)
	f.after = held()

	return f
}

// idle waits for d. It fails the benchmark if ctx ends.
func idle(ctx context.Context, h *harness, d time.Duration) {
	select {
	case <-ctx.Done():
		h.Fatalf("bench: %v", ctx.Err())
	case <-time.After(d):
	}
}

// reportChurn prints the results as a Markdown table and reports whether the limits hold.
func reportChurn(out io.Writer, f churnResults) bool {
	ok := true
	fmt.Fprintln(out, "| resource of the daemon | before | after | limit | verdict |\n|---|---:|---:|---|---|")
	row := func(name string, before, after float64, unit string) {
		verdict := "pass"
		if after > before*churnMore {
			ok, verdict = false, "FAIL"
		}
		fmt.Fprintf(out, "| %s | %.1f%s | %.1f%s | ≤ %.1f × before | %s |\n", name, before, unit, after, unit,
			churnMore, verdict)
	}

	row("memory (RSS)", f.before.RSS/(1<<20), f.after.RSS/(1<<20), " MiB")
	row("goroutines", f.before.Goroutines, f.after.Goroutines, "")
	row("descriptors", f.before.Descriptors, f.after.Descriptors, "")
	fmt.Fprintln(out)

	return ok
}
