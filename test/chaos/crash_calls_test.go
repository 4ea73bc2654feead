package chaos

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The calls with crash points. All of them may be repeated.

func (c *crash) run(ctx context.Context) error {
	r, err := c.daemon.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: c.pod.config(0)})
	c.sandbox = r.GetPodSandboxId()
	return err
}

func (c *crash) create(ctx context.Context) error {
	r, err := c.daemon.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  c.sandbox,
		Config:        c.idle(),
		SandboxConfig: c.pod.config(0),
	})
	c.container = r.GetContainerId()
	return err
}

// idle returns a container that prints nothing and ends as soon as it is stopped.
func (c *crash) idle() *runtimeapi.ContainerConfig {
	cfg := c.pod.container("a", 0)
	cfg.Command, cfg.Mounts = []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"}, nil
	return cfg
}

// start starts the container. A running or ended container was started before the kill.
func (c *crash) start(ctx context.Context) error {
	s, err := c.daemon.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.container})
	if err != nil {
		return err
	}

	switch s.Status.State {
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return nil
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return fmt.Errorf("the container has ended: %v", s.Status)
	}

	_, err = c.daemon.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.container})

	return err
}

func (c *crash) update(ctx context.Context) error {
	_, err := c.daemon.Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.container,
		Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 20, MemoryLimitInBytes: 64 << 20},
	})
	return err
}

func (c *crash) stop(ctx context.Context) error {
	_, err := c.daemon.Runtime.StopContainer(ctx,
		&runtimeapi.StopContainerRequest{ContainerId: c.container, Timeout: 5})
	return err
}

func (c *crash) remove(ctx context.Context) error {
	_, err := c.daemon.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.container})
	return err
}

func (c *crash) stopPod(ctx context.Context) error {
	_, err := c.daemon.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: c.sandbox})
	return err
}

func (c *crash) removePod(ctx context.Context) error {
	_, err := c.daemon.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: c.sandbox})
	return err
}

func (c *crash) pull(ctx context.Context) error {
	_, err := c.daemon.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: c.image}})
	return err
}

// removeImage removes the image and checks its absence.
func (c *crash) removeImage(ctx context.Context) error {
	spec := &runtimeapi.ImageSpec{Image: c.image}
	if _, err := c.daemon.Image.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec}); err != nil {
		return err
	}

	r, err := c.daemon.Image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
	if err == nil && r.Image != nil {
		err = fmt.Errorf("image %s was removed and still exists", r.Image.Id)
	}

	return err
}
