package lives

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Churn says which pods come and go.
type Churn struct {
	Runtime      runtimeapi.RuntimeServiceClient
	Pods, AtOnce int
	Pod          func(i int) *runtimeapi.PodSandboxConfig
	Container    func(name string, command []string) *runtimeapi.ContainerConfig
	Done         func(n int) // called after each, with how many are done; may be nil
}

// Run makes and removes the pods, each with a container that ends by itself. Those that are under
// way when ctx ends are finished. It returns how many there were.
func (c *Churn) Run(ctx context.Context) (int, error) {
	var done atomic.Int64
	g, failed := errgroup.WithContext(context.WithoutCancel(ctx))
	g.SetLimit(c.AtOnce)
	for i := range c.Pods {
		if ctx.Err() != nil || failed.Err() != nil {
			break
		}

		g.Go(func() error {
			if err := c.one(failed, c.Pod(i)); err != nil {
				return fmt.Errorf("pod %d: %w", i, err)
			}
			if n := int(done.Add(1)); c.Done != nil {
				c.Done(n)
			}
			return nil
		})
	}

	err := g.Wait()

	return int(done.Load()), err
}

// one is the life of a pod as a kubelet has it.
func (c *Churn) one(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) error {
	r := c.Runtime
	pod, err := r.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return err
	}

	made, err := r.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod.PodSandboxId,
		Config:        c.Container("main", []string{"true"}),
		SandboxConfig: cfg,
	})
	if err != nil {
		return err
	}

	if _, err := r.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return err
	}

	if _, err := r.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: made.ContainerId}); err != nil {
		return err
	}

	if _, err := r.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
		return err
	}

	_, err = r.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})

	return err
}

// Held is what a daemon holds, by its own metrics.
type Held struct{ RSS, Descriptors, Goroutines float64 }

// ReadHeld reads it from the page of metrics.
func ReadHeld(page string) (h Held, err error) {
	names := map[string]*float64{
		"process_resident_memory_bytes": &h.RSS,
		"process_open_fds":              &h.Descriptors,
		"go_goroutines":                 &h.Goroutines,
	}

	for lines := bufio.NewScanner(strings.NewReader(page)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if to := names[name]; to != nil {
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return h, fmt.Errorf("%s: %w", name, err)
			}
			delete(names, name)
		}
	}

	if len(names) > 0 {
		return h, fmt.Errorf("the metrics lack %v", names)
	}

	return h, nil
}
