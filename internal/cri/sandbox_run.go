package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/undo"
)

// RunPodSandbox makes a pod's sandbox and returns when it is ready (CRI RunPodSandbox). A call that fails leaves nothing; one that is
// repeated returns the sandbox that is there, and what an earlier attempt left is cleared first.
func (s *Service) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	name := spec.SandboxName(r.GetConfig().GetMetadata())
	unlock, err := s.lockName(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("run sandbox: %w", err)
	}
	defer unlock()
	id, err := s.makeSandbox(ctx, r, host)
	if err != nil {
		return nil, fmt.Errorf("run sandbox %s: %w", name, err)
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: string(id)}, nil
}

// makeSandboxIn makes a sandbox that joins a network namespace of ours, or one of the engine's if netns is "". A sandbox image that was removed
// a moment ago, so that the view does not know it yet, is got again.
func (s *Service) makeSandboxIn(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host spec.Host, netns string) (model.ContainerID, error) {
	id, err := s.tryToMakeSandbox(ctx, r, host, netns)
	if !errdefs.IsNotFound(err) {
		return id, err
	}
	if refreshErr := s.View.RefreshImages(ctx); refreshErr != nil {
		return "", errors.Join(err, refreshErr)
	}
	return s.tryToMakeSandbox(ctx, r, host, netns)
}

func (s *Service) tryToMakeSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host spec.Host, netns string) (model.ContainerID, error) {
	create, err := s.translateSandbox(ctx, r, host, netns)
	if err != nil {
		return "", err
	}
	return s.runSandbox(ctx, r.GetConfig(), create, netns)
}

// translateSandbox gathers what the translation needs and is the last step that touches nothing but images.
func (s *Service) translateSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host spec.Host, netns string) (*spec.Create, error) {
	profile, err := readSeccomp(spec.SandboxSeccompFile(r.GetConfig()))
	if err != nil {
		return nil, err
	}
	o := spec.SandboxOptions{Host: host, RuntimeHandler: r.GetRuntimeHandler(), NetworkMode: s.Network.Mode(), NetNS: netns, SeccompProfile: profile}
	if _, err := spec.NewSandbox(r.GetConfig(), o); err != nil { // before an image is pulled for nothing
		return nil, err
	}
	if o.Image, err = s.Engine.PauseImage(ctx); err != nil {
		return nil, err
	}
	return spec.NewSandbox(r.GetConfig(), o)
}

// runSandbox makes and starts the pause and connects the pod. What it acquires hangs on the container, so there is one undo for all: the
// sandbox of that name is taken apart, network first; if that fails, it stays listed as not ready, and the kubelet or recovery tries again.
func (s *Service) runSandbox(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, create *spec.Create, netns string) (id model.ContainerID, err error) {
	var u undo.Stack
	var created model.ContainerID
	u.Push("create", func(ctx context.Context) error { return s.undoSandbox(ctx, create.Name, created) })
	defer func() {
		if err != nil && !errdefs.IsAlreadyExists(err) {
			err = errors.Join(err, u.Run(ctx, undoSandboxDeadline))
		}
	}()
	id, err = s.createSandbox(ctx, create)
	if err != nil {
		return "", asJoinError(err, netns)
	}
	sb, err := s.lockSandbox(ctx, string(id))
	if err != nil {
		return "", err
	}
	defer sb.unlock() // before the undo, which locks what it removes
	created = id

	if s.isReady(sb.Sandbox) {
		return id, nil
	}
	if netns != "" {
		return id, s.startJoined(ctx, id, cfg, netns)
	}
	started, err := s.startPause(ctx, id)
	if err != nil {
		return "", err
	}
	return id, s.connect(ctx, started, cfg)
}

const (
	undoPause   = 100 * time.Millisecond // before the second try of an undo, five times as much before the third
	undoTries   = 3
	quickFailed = 10 * time.Second // a try that took longer has waited for what does not answer, and is not repeated
)

// undoSandbox takes apart what a failed call has made. It tries again what fails quickly: a plugin
// whose ADD was cut off may fail at the first DEL and succeed at the second. The bridge plugin, for
// one, fails at a rule that was never made, and does not look for rules once the interface has
// gone.
func (s *Service) undoSandbox(ctx context.Context, name string, created model.ContainerID) error {
	remove := func() error {
		if created == "" { // a create that was cancelled or lost its answer may have happened
			return s.removeByName(ctx, name)
		}
		return s.removeByID(ctx, created) // also what is left if somebody has removed the pause meanwhile
	}

	pause := undoPause
	for try := 1; ; try++ {
		began := time.Now()
		err := remove()
		if err == nil || try == undoTries || time.Since(began) > quickFailed {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
		pause *= 5
	}
}

// startPause starts the pause and returns what it is then.
func (s *Service) startPause(ctx context.Context, id model.ContainerID) (*spec.Sandbox, error) {
	if err := s.Engine.Start(ctx, id); err != nil {
		return nil, err
	}
	if err := s.View.Refresh(ctx, id); err != nil {
		return nil, err
	}
	sb, err := s.View.Sandbox(string(id))
	if err == nil && !sb.Running {
		err = ended(sb)
	}
	return sb, err
}

// createSandbox makes the pause container. A name in use is either the same pod running, which is returned, or a leftover, which is
// cleared once.
func (s *Service) createSandbox(ctx context.Context, create *spec.Create) (model.ContainerID, error) {
	id, err := s.Engine.Create(ctx, create)
	if !errdefs.IsConflict(err) {
		return id, err
	}
	ready, leftErr := s.clearSandbox(ctx, create.Name)
	if leftErr != nil {
		return "", errors.Join(err, leftErr)
	}
	if ready != "" {
		return ready, nil
	}
	return s.Engine.Create(ctx, create)
}

// clearSandbox removes what an earlier attempt left under a name. The same pod is returned if it is
// ready. AlreadyExists if the name is not a pod's of ours.
func (s *Service) clearSandbox(ctx context.Context, name string) (ready model.ContainerID, err error) {
	id, o, err := s.Engine.FindByName(ctx, name)
	if err != nil {
		return "", notFoundIsFine(err)
	}
	if o.Sandbox == nil {
		return "", fmt.Errorf("container %s has the name and is not ours; remove it: %w", id, errdefs.ErrAlreadyExists)
	}
	sb, err := s.lockFoundSandbox(ctx, id)
	if err != nil {
		return "", err
	}
	defer sb.unlock()

	if s.isReady(sb.Sandbox) {
		return id, nil
	}
	return "", s.removeSandbox(ctx, sb)
}

// lockFoundSandbox locks a sandbox that the engine has, whether or not the view knows it yet.
func (s *Service) lockFoundSandbox(ctx context.Context, id model.ContainerID) (*lockedSandbox, error) {
	if err := s.View.Refresh(ctx, id); err != nil {
		return nil, err
	}
	return s.lockSandbox(ctx, string(id))
}

// isReady says whether a pod has all that RunPodSandbox gives.
func (s *Service) isReady(sb *spec.Sandbox) bool {
	return sb.Ready() && (sb.HostNetwork() || s.connected(sb))
}

// removeByName takes apart what of ours has this name, if there is something.
func (s *Service) removeByName(ctx context.Context, name string) error {
	id, o, err := s.Engine.FindByName(ctx, name)
	switch {
	case err != nil:
		return notFoundIsFine(err)
	case o.Sandbox != nil:
		return s.removeByID(ctx, id)
	case o.Container != nil:
		c, err := s.lockFoundContainer(ctx, id)
		if err != nil {
			return notFoundIsFine(err)
		}
		defer c.unlock()
		return s.removeContainer(ctx, c)
	}
	return nil // somebody else's
}

// removeByID takes apart a sandbox, or what is left of one. It needs no inspect: the engine may
// hang on that while it starts the pause.
func (s *Service) removeByID(ctx context.Context, id model.ContainerID) error {
	sb, err := s.lockSandbox(ctx, string(id))
	if err != nil {
		return err
	}
	defer sb.unlock()
	return s.removeSandbox(ctx, sb)
}
