package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/undo"
	"cri-dockerd/internal/validate"
)

// CreateContainer creates a container in a running sandbox (CRI CreateContainer). A failed call
// leaves nothing behind. A leftover of an earlier attempt under the same name is removed first.
func (s *Service) CreateContainer(
	ctx context.Context, r *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	host, err := s.host()
	if err != nil {
		return nil, err
	}

	var u undo.Stack
	create, done, err := s.translateContainer(ctx, r, host, &u)
	defer done()

	if err != nil {
		return nil, errors.Join(fmt.Errorf("create container %s: %w", r.GetConfig().GetMetadata().GetName(), err),
			u.Run(ctx, undoDeadline))
	}

	id, err := s.create(ctx, r.GetPodSandboxId(), create)
	if err != nil {
		return nil, errors.Join(err, u.Run(ctx, undoDeadline))
	}

	return &runtimeapi.CreateContainerResponse{ContainerId: string(id)}, nil
}

// create creates a translated container. On failure it removes everything it created.
func (s *Service) create(ctx context.Context, sandboxID string, create *translate.Create) (model.ContainerID, error) {
	unlock, err := s.lockName(ctx, create.Name)
	if err != nil {
		return "", fmt.Errorf("create container: %w", err)
	}
	defer unlock()

	for _, w := range create.Warnings {
		s.Log.Warn(w, "container", create.Name)
	}

	if err := createDirs(create.MakeDirs); err != nil {
		return "", fmt.Errorf("create container %s: %w", create.Name, err)
	}

	var u undo.Stack
	var id model.ContainerID
	u.Push("create", func(ctx context.Context) error { return s.removeByName(ctx, create.Name, id) })
	id, err = s.createContainer(ctx, create)
	if err == nil {
		err = s.View.Refresh(ctx, id)
	}

	if err == nil { // the pod may have been stopped meanwhile, without this container
		_, err = s.runningSandbox(sandboxID)
	}

	if err == nil {
		err = s.hooks.create(ctx, id)
	}

	if errdefs.IsAlreadyExists(err) {
		return "", err // another container owns the name and keeps it
	}

	if err != nil {
		return "", errors.Join(err, u.Run(ctx, undoDeadline))
	}

	return id, nil
}

// translateContainer collects the input of the translation. Its only side effects are image
// volumes: u undoes them. Call done once the view has the container, or after the undo.
func (s *Service) translateContainer(
	ctx context.Context, r *runtimeapi.CreateContainerRequest, host model.Host, u *undo.Stack,
) (_ *translate.Create, done func(), err error) {
	cfg, nothing := r.GetConfig(), func() {}
	sb, err := s.runningSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, nothing, err
	}

	if _, err := s.Visible.Sandbox(string(sb.ID)); err != nil { // its plugins have not completed
		return nil, nothing, err
	}

	image, err := findImage(ctx, s.ImageView, cfg.GetImage().GetImage())
	if err != nil {
		return nil, nothing, err
	}

	if err := s.checkContainer(cfg, sb, image, host); err != nil {
		return nil, nothing, err
	}

	profile, err := readSeccomp(translate.SeccompFile(cfg))
	if err != nil {
		return nil, nothing, err
	}

	log, err := s.Logs.Config(ctx, r.GetSandboxConfig().GetLogDirectory(), cfg.GetLogPath())
	if err != nil {
		return nil, nothing, err
	}

	users, err := accounts(ctx, s.Accounts, s.Log, image)
	if err != nil {
		return nil, nothing, err
	}

	volumes, done, err := s.volumes.prepare(ctx, cfg, host, u)
	if err != nil {
		return nil, done, err
	}

	create, err := translate.NewContainer(cfg, r.GetSandboxConfig(), translate.ContainerOptions{
		Host:           host,
		Sandbox:        sb,
		Image:          image,
		Accounts:       users,
		SeccompProfile: profile,
		Log:            log,
		ImageVolumes:   volumes,
		Plugins:        s.hooks != nil,
	})

	return create, done, err
}

// accounts returns the users of an image, nil if the engine cannot open their files, or refuses to:
// an authorization plugin or a proxy may not know the requests. The engine's own rules apply then.
func accounts(ctx context.Context, store Accounts, log *slog.Logger, image *model.Image) (*model.Accounts, error) {
	a, err := store.Accounts(ctx, image.ID)
	if errdefs.IsInternal(err) || errdefs.IsPermissionDenied(err) || errdefs.IsNotImplemented(err) {
		log.Warn("cannot read the users of an image; its groups may be missing", "image", image.ID, "err", err)
		return nil, nil
	}
	return a, err
}

// checkContainer checks a configuration against the engine, the kernel and the other containers.
func (d *Deps) checkContainer(
	cfg *runtimeapi.ContainerConfig, sb *model.Sandbox, image *model.Image, host model.Host,
) error {
	if err := validate.Container(cfg, sb, image, host); err != nil {
		return err
	}

	appArmor, field := model.AppArmorProfile(cfg.GetLinux().GetSecurityContext())
	if err := d.checkAppArmor(field, appArmor, host); err != nil {
		return err
	}

	return checkTarget(d.View, cfg)
}

// checkTarget checks that the container whose PID namespace the new one joins exists.
func checkTarget(v View, cfg *runtimeapi.ContainerConfig) error {
	target := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId()
	if target == "" {
		return nil
	}

	if _, err := v.Container(target); err != nil {
		return fmt.Errorf("config.linux.security_context.namespace_options.target_id: %w", err)
	}

	return nil
}

// createDirs creates missing host paths of mounts, as the kubelet expects for a hostPath without a
// type. The undo keeps them: other pods may use them.
func createDirs(dirs []string) error {
	for _, d := range dirs {
		if _, err := os.Stat(d); errors.Is(err, os.ErrNotExist) {
			if err := os.MkdirAll(linkTarget(d), 0o755); err != nil {
				return fmt.Errorf("create missing host path: %w: %w", err, errdefs.ErrFailedPrecondition)
			}
		}
	}

	return nil
}

// maxLinks is Linux's limit for following symbolic links (path_resolution(7)).
const maxLinks = 40

// linkTarget follows a dangling symbolic link to its target path. It returns any other path
// unchanged.
func linkTarget(file string) string {
	for range maxLinks {
		to, err := os.Readlink(file)
		if err != nil {
			return file
		}

		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(file), to)
		}

		file = to
	}

	return file
}

// createContainer creates the container. If a leftover with the same name is not running, it is
// removed and the create is retried once.
func (s *Service) createContainer(ctx context.Context, create *translate.Create) (model.ContainerID, error) {
	id, err := s.Engine.Create(ctx, create)
	if !errdefs.IsConflict(err) {
		return id, err
	}

	if leftErr := s.clearContainer(ctx, create.Name); leftErr != nil {
		return "", errors.Join(err, leftErr)
	}

	return s.Engine.Create(ctx, create)
}

// clearContainer removes a leftover of an earlier attempt under a name. AlreadyExists if it is
// running, or not managed by this daemon.
func (s *Service) clearContainer(ctx context.Context, name string) error {
	id, o, err := s.Engine.FindByName(ctx, name)
	if err != nil {
		return ignoreNotFound(err)
	}

	inUse := fmt.Errorf("container %s already has this name: %w", id, errdefs.ErrAlreadyExists)
	if o.Container == nil {
		return inUse
	}

	c, err := s.lockFoundContainer(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	defer c.unlock()

	if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
		return inUse
	}

	return s.removeContainer(ctx, c)
}

// lockFoundContainer locks a container known to the engine, even if the view lacks it.
func (g *gate) lockFoundContainer(ctx context.Context, id model.ContainerID) (*lockedContainer, error) {
	if err := g.view.Refresh(ctx, id); err != nil {
		return nil, err
	}
	return g.lockContainer(ctx, string(id))
}
