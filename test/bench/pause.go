package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/test/engines"
)

// pauseCommand runs the program as the benchmark of the pause container's seccomp profiles.
const pauseCommand = "pause"

// pauseProfiles are the measured values of Docker's security option. The own profile must not be
// slower than Docker's.
var pauseProfiles = []struct {
	name    string
	options []string
}{
	{"unconfined", []string{"seccomp=unconfined"}},
	{"Docker's default profile", nil},
	{"the pause image's own profile", []string{"seccomp=" + pause.Seccomp}},
}

// benchPause starts the pause program with each profile in turn, and reports whether the own
// profile is not slower than Docker's, for each engine.
func benchPause(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(pauseCommand, flag.ExitOnError)
	rounds := flags.Int("rounds", 60, "starts with each profile")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		e := engines.Start(h, v)
		docker := e.Docker(h)
		image := loadPauseImage(ctx, h, docker)
		times := make([][]time.Duration, len(pauseProfiles))
		for i := range *rounds + warmUp {
			for p, profile := range pauseProfiles {
				took := startPause(ctx, h, docker, image, e.CgroupParent, profile.options)
				if i >= warmUp {
					times[p] = append(times[p], took)
				}
			}
		}

		fmt.Printf("Docker Engine %s, %d starts with each profile, %d CPUs, load average %s before the run, %s\n\n",
			v, *rounds, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = printPauseTimes(times) && ok
	}

	return ok
}

// printPauseTimes prints the table. The differences are medians over adjacent starts.
func printPauseTimes(times [][]time.Duration) bool {
	fmt.Println("| start of the pause container | p50 | above unconfined | verdict |\n|---|---:|---:|---|")
	above := make([]time.Duration, len(times))
	for p, profile := range pauseProfiles {
		above[p] = quantile(differences(times[p], times[0]), 50)
		verdict := ""
		if p == len(times)-1 {
			verdict = "pass"
			if above[p] > above[p-1] {
				verdict = "FAIL"
			}
		}
		fmt.Printf("| %s | %s | %s | %s |\n", profile.name, ms(quantile(times[p], 50)), ms(above[p]), verdict)
	}

	fmt.Println()
	last := len(times) - 1

	return above[last] <= above[last-1]
}

func loadPauseImage(ctx context.Context, h *harness, docker *client.Client) string {
	img, err := pause.New(runtime.GOARCH)
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	r, err := docker.ImageLoad(ctx, bytes.NewReader(img.Archive))
	if err != nil {
		h.Fatalf("bench: load the pause image: %v", err)
	}
	defer r.Close() //nolint:errcheck // read to its end

	if _, err := io.Copy(io.Discard, r); err != nil {
		h.Fatalf("bench: load the pause image: %v", err)
	}

	return img.Ref
}

// startPause creates, starts and removes a pause container and returns the time of the start.
func startPause(
	ctx context.Context, h *harness, docker *client.Client, image, parent string, options []string,
) time.Duration {
	c, err := docker.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config: &container.Config{Image: image},
		HostConfig: &container.HostConfig{
			NetworkMode: "none",
			LogConfig:   container.LogConfig{Type: "none"},
			SecurityOpt: append([]string{"no-new-privileges"}, options...),
			Resources:   container.Resources{CgroupParent: parent},
		},
	})
	if err != nil {
		h.Fatalf("bench: create: %v", err)
	}

	begin := time.Now()
	if _, err := docker.ContainerStart(ctx, c.ID, client.ContainerStartOptions{}); err != nil {
		h.Fatalf("bench: start: %v", err)
	}

	took := time.Since(begin)
	if _, err := docker.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true}); err != nil {
		h.Fatalf("bench: remove: %v", err)
	}

	return took
}
