package cri

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/undo"
	"cri-dockerd/internal/validate"
)

// RunPodSandbox creates and starts a pod's sandbox and returns when it is ready (CRI
// RunPodSandbox). A failed call leaves nothing behind. A repeated call returns the existing
// sandbox, or clears the leftovers of an earlier attempt first.
func (s *Service) RunPodSandbox(
	ctx context.Context, r *runtimeapi.RunPodSandboxRequest,
) (*runtimeapi.RunPodSandboxResponse, error) {
	if r.GetRuntimeHandler() == "" { // another one runs without the shim in any case
		if err := awaitTrial(ctx, s.States); err != nil {
			return nil, err
		}
	}

	host, err := s.host()
	if err != nil {
		return nil, err
	}

	name := translate.SandboxName(r.GetConfig().GetMetadata())
	err = validate.Sandbox(r, host)
	if err == nil {
		err = s.checkAppArmor("apparmor", r.GetConfig().GetLinux().GetSecurityContext().GetApparmor(), host)
	}

	if err == nil {
		err = checkShim(r, host)
	}

	if err != nil {
		return nil, fmt.Errorf("run sandbox %s: %w", name, err)
	}

	unlock, err := s.lockName(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("run sandbox: %w", err)
	}
	defer unlock()

	run := s.runWithEngineNetNS
	if s.canOwnNetNS(r, host) {
		run = s.runWithOwnNetNS
	}

	id, err := run(ctx, r, host)
	if err != nil {
		return nil, fmt.Errorf("run sandbox %s: %w", name, err)
	}

	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: string(id)}, nil
}

// canOwnNetNS reports whether the daemon creates the pod's network namespace. It does so before the
// pause container exists: plugins then connect the namespace while the engine starts the pause
// process, which joins it. See docs/adr/0005.
func (s *Service) canOwnNetNS(r *runtimeapi.RunPodSandboxRequest, host model.Host) bool {
	options := r.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions()
	if options.GetNetwork() == runtimeapi.NamespaceMode_NODE || !s.Node.ConnectsPods() {
		return false
	}

	if reason := translate.EngineNetNS(r, host); reason != "" {
		pod := translate.SandboxName(r.GetConfig().GetMetadata())
		s.Log.Debug("the engine creates the pod's network namespace", "pod", pod, "reason", reason)
		return false
	}

	return s.joining.try(time.Now()) // last, since it uses up this pod's turn to try
}

// runWithOwnNetNS runs a sandbox with a network namespace of the daemon. If the pause process
// cannot join it, and none has joined on this node before, the engine creates the namespaces, now
// and for a while.
func (s *Service) runWithOwnNetNS(
	ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host model.Host,
) (model.ContainerID, error) {
	id, err := s.runJoined(ctx, r, host)
	var join *joinError
	if !errors.As(err, &join) || ctx.Err() != nil || s.joining.isTrusted() {
		return id, err
	}

	id, err = s.runWithEngineNetNS(ctx, r, host)
	if err != nil {
		return "", err // the namespace was not the reason
	}

	until := s.joining.fallBack(join.Error(), time.Now())
	s.Log.Warn("pause process cannot join the pod's network namespace; the engine creates network namespaces for now",
		"reason", join, "until", until)

	return id, nil
}

func (s *Service) runJoined(
	ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host model.Host,
) (model.ContainerID, error) {
	netns, drop, err := s.Network.Prepare(translate.NetSysctls(r.GetConfig()))
	if errdefs.IsInvalidArgument(err) {
		return "", fmt.Errorf("config.linux.sysctls: %w", err)
	} else if err != nil {
		return "", &joinError{err}
	}
	defer drop() // the sandbox, if any, keeps the namespace

	create, err := s.translateSandbox(ctx, r, host, netns)
	if err != nil {
		return "", err
	}

	return s.runPause(ctx, create, func(id model.ContainerID) error {
		release, err := s.Network.Keep(ctx, id, netns)
		if err != nil {
			return err
		}
		defer release()
		return s.startAndConnect(ctx, id, r.GetConfig())
	})
}

// runWithEngineNetNS runs a sandbox and lets the engine create its network namespace.
func (s *Service) runWithEngineNetNS(
	ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host model.Host,
) (model.ContainerID, error) {
	create, err := s.translateSandbox(ctx, r, host, "")
	if err != nil {
		return "", err
	}

	return s.runPause(ctx, create, func(id model.ContainerID) error {
		sb, err := s.startPause(ctx, id)
		if err != nil {
			return err
		}
		return s.connect(ctx, sb, r.GetConfig())
	})
}

// translateSandbox collects the input of the translation and translates the request. Its only side
// effect is a pull or load of the sandbox image. netns is a namespace of Prepare, or "" to let the
// engine create one.
func (s *Service) translateSandbox(
	ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host model.Host, netns string,
) (*translate.Create, error) {
	profile, err := readSeccomp(translate.SandboxSeccompFile(r.GetConfig()))
	if err != nil {
		return nil, err
	}

	o := translate.SandboxOptions{
		Host:           host,
		RuntimeHandler: r.GetRuntimeHandler(),
		NetworkMode:    model.NetworkMode(s.Node.ConnectsPods()),
		NetNS:          netns,
		SeccompProfile: profile,
		Plugins:        s.hooks != nil,
	}
	if o.Image, err = s.Images.PauseImage(ctx); err != nil {
		return nil, err
	}

	return translate.NewSandbox(r.GetConfig(), o)
}

// runPause creates a pause container and completes its sandbox. It retries once if an object was
// removed a moment ago: the sandbox image, still present in the view, or the pause container
// (docker container prune).
func (s *Service) runPause(
	ctx context.Context, create *translate.Create, complete func(id model.ContainerID) error,
) (model.ContainerID, error) {
	id, err := s.tryPause(ctx, create, complete)
	if !errdefs.IsNotFound(err) {
		return id, err
	}

	if renewErr := s.renewPauseImage(ctx, create); renewErr != nil {
		return "", errors.Join(err, renewErr)
	}

	return s.tryPause(ctx, create, complete)
}

// renewPauseImage provides the sandbox image again.
func (s *Service) renewPauseImage(ctx context.Context, create *translate.Create) error {
	if err := s.ImageView.RefreshImages(ctx); err != nil {
		return err
	}

	image, err := s.Images.PauseImage(ctx)
	if err != nil {
		return err
	}

	create.Config.Image = image.Source

	return nil
}

// tryPause creates a pause container and completes its sandbox under the sandbox's lock. All
// acquired resources belong to the container, so one undo suffices: remove the sandbox of this
// name, network first. If the undo fails, the sandbox stays listed as not ready, and the kubelet or
// recovery retries.
func (s *Service) tryPause(
	ctx context.Context, create *translate.Create, complete func(id model.ContainerID) error,
) (id model.ContainerID, err error) {
	var u undo.Stack
	var created model.ContainerID
	u.Push("create", func(ctx context.Context) error { return s.undoSandbox(ctx, create.Name, created) })
	defer func() {
		if err != nil && !errdefs.IsAlreadyExists(err) {
			err = errors.Join(err, u.Run(ctx, undoSandboxDeadline))
		}
	}()

	id, isRunning, err := s.createPause(ctx, create)
	if err != nil || isRunning {
		return id, err
	}

	sb, err := s.lockSandbox(ctx, string(id))
	if err != nil {
		return "", err
	}
	defer sb.unlock() // before the undo, since it takes the lock again

	created = id
	if err := complete(id); err != nil {
		return id, err
	}

	return id, s.hooks.runPod(ctx, id)
}

// createPause creates the pause container. If the name is in use, it returns the running sandbox of
// the same pod, or clears a leftover once.
func (s *Service) createPause(
	ctx context.Context, create *translate.Create,
) (id model.ContainerID, isRunning bool, err error) {
	id, err = s.Engine.Create(ctx, create)
	if !errdefs.IsConflict(err) {
		return id, false, asJoinError(err)
	}

	ready, clearErr := s.clearSandbox(ctx, create.Name)
	if clearErr != nil {
		return "", false, errors.Join(err, clearErr)
	}
	if ready != "" {
		return ready, true, nil
	}

	id, err = s.Engine.Create(ctx, create)

	return id, false, asJoinError(err)
}

// startPause starts the pause container and returns its record.
func (s *Service) startPause(ctx context.Context, id model.ContainerID) (*model.Sandbox, error) {
	if err := s.Engine.Start(ctx, id); err != nil {
		return nil, asJoinError(err)
	}

	if err := s.View.Refresh(ctx, id); err != nil {
		return nil, asJoinError(err)
	}

	sb, err := s.View.Sandbox(string(id))
	if err == nil && !sb.Running {
		err = pauseExitError(sb)
	}

	return sb, asJoinError(err)
}

// connect writes the pod's resolv.conf and connects the namespace created by the engine.
func (s *Service) connect(ctx context.Context, sb *model.Sandbox, cfg *runtimeapi.PodSandboxConfig) error {
	if err := s.writeResolvConf(sb, cfg); err != nil {
		return err
	}

	if sb.HostNetwork() {
		return nil
	}
	if _, err := s.Network.Connect(ctx, sb, cfg); err != nil {
		return err
	}

	return s.Network.Confirm(sb.ID)
}

// startAndConnect starts the pause container and connects the namespace of Keep at the same time.
// The pod is complete once the pause process has joined the namespace and the pod's files are
// written.
func (s *Service) startAndConnect(ctx context.Context, id model.ContainerID, cfg *runtimeapi.PodSandboxConfig) error {
	g, both := errgroup.WithContext(ctx)
	var ips []netip.Addr
	g.Go(func() (err error) {
		created := &model.Sandbox{
			ID:          id,
			Metadata:    cfg.GetMetadata(),
			Annotations: cfg.GetAnnotations(),
			OwnNetNS:    true,
		}

		ips, err = s.Network.Connect(both, created, cfg)

		return err
	})

	var sb *model.Sandbox
	g.Go(func() (err error) {
		// A failed Connect does not cancel the start: it would stay unknown whether the pause runs.
		if sb, err = s.startPause(ctx, id); err != nil {
			return err
		}
		return s.awaitJoined(ctx, sb)
	})

	if err := g.Wait(); err != nil {
		return err
	}

	if err := s.writeResolvConf(sb, cfg); err != nil {
		return err
	}

	if sb.HostsPath != "" { // Docker has copied the node's hosts file
		if err := s.writePodFile(sb.ID, sb.HostsPath, translate.Hosts(cfg.GetHostname(), ips)); err != nil {
			return fmt.Errorf("write the pod's hosts file: %w", err)
		}
	}

	s.joining.succeeded()

	return s.Network.Confirm(id)
}

// writeResolvConf writes the kubelet's DNS configuration in place: all containers of the pod have
// the file mounted.
func (s *Service) writeResolvConf(sb *model.Sandbox, cfg *runtimeapi.PodSandboxConfig) error {
	if cfg.GetDnsConfig() == nil || sb.ResolvConfPath == "" {
		return nil
	}
	if err := s.writePodFile(sb.ID, sb.ResolvConfPath, translate.ResolvConf(cfg.GetDnsConfig())); err != nil {
		return fmt.Errorf("write the pod's resolv.conf: %w", err)
	}
	return nil
}

// isReady reports whether a pod has everything RunPodSandbox provides.
func (d *Deps) isReady(sb *model.Sandbox) bool {
	return sb.Ready() && d.Network.IsConnected(sb) && !d.Concealer.IsConcealed(sb.ID)
}
