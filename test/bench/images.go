package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/registry"
)

// imagesCommand runs the program as the benchmark of pulls.
const imagesCommand = "images"

// pullRSSLimit limits the daemon's resident memory during pulls, in bytes.
const pullRSSLimit = 40 << 20

// pullResults are the results of pulling the same number of images in parallel through the daemon
// and without it.
type pullResults struct {
	cri, docker  time.Duration
	before, most int64 // the daemon's resident memory before the pulls and its peak, in bytes
}

// benchImages does one run for each engine and reports whether all limits hold.
func benchImages(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(imagesCommand, flag.ExitOnError)
	images := flags.Int("images", 10, "images to pull in parallel")
	size := flags.Int64("size", 100, "size of each in MB, in one layer")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		f := pullImages(ctx, h, v, *images, *size*1_000_000)
		fmt.Printf("Docker Engine %s, %d images of %d MB in parallel, %d CPUs, %s\n\n", v, *images, *size,
			runtime.NumCPU(), time.Now().UTC().Format(time.DateOnly))
		ok = reportImages(os.Stdout, f) && ok
	}

	return ok
}

func pullImages(ctx context.Context, h *harness, v engines.Version, images int, size int64) (f pullResults) {
	e := engines.Start(h, v)
	d := e.Daemon(h, "--log-level=info")
	r := registry.Serve(h, e.Listen(h, "127.0.0.1:0"))
	docker := e.Docker(h)
	var floor, refs []string
	for i := range images {
		floor = append(floor, r.Add(h, fmt.Sprint("floor", i), "1", 1, size))
		refs = append(refs, r.Add(h, fmt.Sprint("cri", i), "1", 1, size))
	}

	f.docker = forAll(h, floor, func(ref string) error {
		p, err := docker.ImagePull(ctx, ref, client.ImagePullOptions{})
		if err == nil {
			err = p.Wait(ctx)
		}

		if err == nil {
			_, err = docker.ImageRemove(ctx, ref, client.ImageRemoveOptions{})
		}

		return err
	})

	f.before = d.RSS(h)
	stop, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)

		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()

		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				f.most = max(f.most, d.RSS(h))
			}
		}
	}()

	f.cri = forAll(h, refs, func(ref string) error {
		i := &runtimeapi.ImageSpec{Image: ref}
		_, err := d.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: i})
		if err == nil {
			_, err = d.Image.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: i})
		}
		return err
	})

	close(stop)
	<-watched

	return f
}

// forAll calls do for all images concurrently and returns the elapsed time.
func forAll(h *harness, refs []string, do func(ref string) error) time.Duration {
	began := time.Now()
	var g errgroup.Group
	for _, ref := range refs {
		g.Go(func() error { return do(ref) })
	}

	if err := g.Wait(); err != nil {
		h.Fatalf("bench: %v", err)
	}

	return time.Since(began)
}

// reportImages prints the results as a Markdown table and reports whether the limit holds.
func reportImages(out io.Writer, f pullResults) bool {
	ok, verdict := f.most > 0 && f.most <= pullRSSLimit, "FAIL"
	if ok {
		verdict = "pass"
	}

	fmt.Fprintln(out, "| metric | value | limit | verdict |\n|---|---:|---|---|")
	fmt.Fprintf(out, "| memory of the daemon (RSS) before the pulls | %.1f MiB | | |\n", float64(f.before)/(1<<20))
	fmt.Fprintf(out, "| peak memory of the daemon (RSS) during the pulls | %.1f MiB | ≤ %d MiB | %s |\n",
		float64(f.most)/(1<<20), pullRSSLimit>>20, verdict)
	fmt.Fprintf(out, "| pulls and removals through the daemon | %.2f × without it (%.1f s, %.1f s) | | |\n\n",
		f.cri.Seconds()/f.docker.Seconds(), f.cri.Seconds(), f.docker.Seconds())

	return ok
}
