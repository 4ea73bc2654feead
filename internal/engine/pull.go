package engine

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// Pull pulls an image (POST /images/create) and returns the engine's ID of it. It ends with Unavailable when nothing at all has moved for
// PullDeadline (download, verification and extraction all count), and with ctx.
func (e *Engine) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (string, error) {
	if spec.Familiar(ref) == "" {
		return "", fmt.Errorf("image.image: %q is not an image's name: %w", ref, errdefs.ErrInvalidArgument)
	}
	header, err := authHeader(auth)
	if err != nil {
		return "", fmt.Errorf("pull %s: auth: %w", ref, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	progress := newWatchdog(e.cfg.PullDeadline, func(last string) {
		cancel(fmt.Errorf("nothing moved for %s (--image-pull-progress-deadline), last: %s: %w", e.cfg.PullDeadline, last, errdefs.ErrUnavailable))
	})
	defer progress.stop()
	r, err := e.docker().ImagePull(ctx, ref, client.ImagePullOptions{RegistryAuth: header})
	if err != nil {
		return "", wrap(causeOr(ctx, err), "pull %s", ref)
	}
	defer r.Close()
	for m, err := range r.JSONMessages(ctx) {
		if err != nil {
			return "", wrap(causeOr(ctx, err), "pull %s", ref)
		}
		if m.Error != nil {
			return "", fmt.Errorf("pull %s: %w", ref, m.Error)
		}
		progress.moved(m.ID + " " + m.Status)
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("pull %s: %w", ref, context.Cause(ctx))
	}
	in, err := e.docker().ImageInspect(ctx, ref)
	if err != nil {
		return "", wrap(err, "inspect pulled image %s", ref)
	}
	return in.ID, nil
}

// causeOr is the reason for which ctx was cancelled, or err.
func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		return cause
	}
	return err
}

// authHeader is the X-Registry-Auth header for CRI credentials, "" without any.
func authHeader(a *runtimeapi.AuthConfig) (string, error) {
	if a == nil {
		return "", nil
	}
	c := registry.AuthConfig{
		Username: a.GetUsername(), Password: a.GetPassword(), ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
	if a.GetAuth() != "" && c.Username == "" {
		plain, err := base64.StdEncoding.DecodeString(a.GetAuth())
		if err != nil {
			return "", fmt.Errorf("auth.auth is not base64: %w", errdefs.ErrInvalidArgument)
		}
		user, password, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
		if !ok {
			return "", fmt.Errorf("auth.auth is not user:password in base64: %w", errdefs.ErrInvalidArgument)
		}
		c.Username, c.Password = user, password
	}
	return authconfig.Encode(c)
}

// watchdog calls bite once when moved has not been called for a while.
type watchdog struct {
	timer *time.Timer // nil without a deadline
	after time.Duration
	last  atomic.Pointer[string]
}

func newWatchdog(after time.Duration, bite func(last string)) *watchdog {
	w := &watchdog{after: after}
	first := "the request was sent"
	w.last.Store(&first)
	if after > 0 {
		w.timer = time.AfterFunc(after, func() { bite(*w.last.Load()) })
	}
	return w
}

func (w *watchdog) moved(what string) {
	w.last.Store(&what)
	if w.timer != nil {
		w.timer.Reset(w.after)
	}
}

func (w *watchdog) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
