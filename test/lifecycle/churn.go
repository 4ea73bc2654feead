package lifecycle

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

// Churn selects the pods to create and remove.
type Churn struct {
	Runtime      runtimeapi.RuntimeServiceClient
	Pods, AtOnce int
	Pod          func(i int) *runtimeapi.PodSandboxConfig
	Container    func(name string, command []string) *runtimeapi.ContainerConfig
	Done         func(n int) // called after each pod with the number of finished pods; may be nil
}

// Run creates and removes the pods, each with a container that exits by itself. When ctx ends, it
// finishes the pods in progress. It returns the number of finished pods.
func (c *Churn) Run(ctx context.Context) (int, error) {
	var done atomic.Int64
	g, failed := errgroup.WithContext(context.WithoutCancel(ctx))
	g.SetLimit(c.AtOnce)
	for i := range c.Pods {
		if ctx.Err() != nil || failed.Err() != nil {
			break
		}

		g.Go(func() error {
			if err := c.runOne(failed, c.Pod(i)); err != nil {
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

// runOne takes one pod through its lifecycle like a kubelet.
func (c *Churn) runOne(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) error {
	r := c.Runtime
	pod, err := r.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return err
	}

	created, err := r.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod.PodSandboxId,
		Config:        c.Container("main", []string{"true"}),
		SandboxConfig: cfg,
	})
	if err != nil {
		return err
	}

	id := created.ContainerId
	if _, err := r.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return err
	}

	if _, err := r.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}); err != nil {
		return err
	}

	if _, err := r.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
		return err
	}

	_, err = r.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})

	return err
}

// Usage is a daemon's resource usage, from its own metrics.
type Usage struct{ RSS, Descriptors, Goroutines float64 }

// ReadUsage parses the daemon's metrics.
func ReadUsage(page string) (u Usage, err error) {
	names := map[string]*float64{
		"process_resident_memory_bytes": &u.RSS,
		"process_open_fds":              &u.Descriptors,
		"go_goroutines":                 &u.Goroutines,
	}

	for lines := bufio.NewScanner(strings.NewReader(page)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if to := names[name]; to != nil {
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return u, fmt.Errorf("%s: %w", name, err)
			}
			delete(names, name)
		}
	}

	if len(names) > 0 {
		return u, fmt.Errorf("missing metrics: %v", names)
	}

	return u, nil
}
