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

// churnCommand runs the program as the benchmark of many pods that come and go.
const churnCommand = "churn"

const (
	// churnWarmUp is how many pods come before the first reading. What is made once must be there
	// then, and so must the pages of the program itself: they count as resident, and one of its 18
	// MiB is used for the first time somewhere among the first hundreds of pods.
	churnWarmUp = 500
	churnMore   = 1.1 // what the daemon may hold after, as a multiple of what it held before
)

// churnFigures are what the daemon held before and after so many pods.
type churnFigures struct {
	before, after lifecycle.Usage
	pods          int
	took          time.Duration
}

// benchChurn does one run and says whether all limits hold.
func benchChurn(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(churnCommand, flag.ExitOnError)
	pods := flags.Int("pods", 10000, "pods that are made and removed, with one container each")
	atOnce := flags.Int("at-once", 4, "how many of them are there at the same time")
	longest := flags.Duration("for", 24*time.Hour, "no pod is begun after this time")
	rest := flags.Duration("rest", 3*time.Minute, "time of rest before each reading: Go gives memory back slowly")
	version := flags.String("engine", string(engines.V20), "engine: 20.10 or 29")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	load := loadAverage(h)
	f := churn(ctx, h, engines.Version(*version), *pods, *atOnce, *longest, *rest)
	fmt.Printf("Docker Engine %s, %d pods with one container each, %d at once, in %s, %d CPUs, load average %s "+
		"before the run, %s\n\n",
		*version, f.pods, *atOnce, f.took.Round(time.Second), runtime.NumCPU(), load,
		time.Now().UTC().Format(time.DateOnly))

	return reportChurn(os.Stdout, f)
}

func churn(
	ctx context.Context, h *harness, v engines.Version, pods, atOnce int, longest, rest time.Duration,
) churnFigures {
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
	idle(ctx, h, rest)
	f := churnFigures{before: held()}
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
	idle(ctx, h, rest)
	f.after = held()

	return f
}

// idle waits, unless the benchmark is to end.
func idle(ctx context.Context, h *harness, d time.Duration) {
	select {
	case <-ctx.Done():
		h.Fatalf("bench: %v", ctx.Err())
	case <-time.After(d):
	}
}

// reportChurn prints the figures as a Markdown table and says whether the limits hold.
func reportChurn(out io.Writer, f churnFigures) bool {
	ok := true
	fmt.Fprintln(out, "| of the daemon | before | after | limit | verdict |\n|---|---:|---:|---|---|")
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
