package engine

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/text"
)

// Pull pulls an image (POST /images/create) and returns the engine's ID of it. Concurrent calls for
// the same image with the same credentials share one pull, and it is cancelled when all of them are
// cancelled. Errors are InvalidArgument for an invalid image name, NotFound, PermissionDenied or
// Unavailable depending on the registry's response, Unavailable without progress for PullDeadline,
// or the error of ctx.
func (e *Engine) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (model.ImageID, error) {
	if model.FamiliarName(ref) == "" {
		return "", fmt.Errorf("image.image: %q is not a valid image name: %w", ref, errdefs.ErrInvalidArgument)
	}

	if name := model.FamiliarName(ref); strings.HasPrefix(name, pause.Repository+":") ||
		strings.HasPrefix(name, pause.Repository+"@") {
		return "", fmt.Errorf("image.image: %s is the embedded sandbox image and cannot be pulled: %w", ref,
			errdefs.ErrPermissionDenied)
	}

	header, err := authHeader(auth)
	if err != nil {
		return "", fmt.Errorf("pull %s: auth: %w", ref, err)
	}

	return e.sharedPull(ctx, ref, header)
}

func (e *Engine) sharedPull(ctx context.Context, ref, header string) (model.ImageID, error) {
	id, err := e.pulls.do(ctx, model.FamiliarName(ref)+"\n"+header, func(ctx context.Context) (string, error) {
		return e.pull(ctx, ref, header)
	})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", ref, secret.Hide(err, secrets(header)...))
	}
	return model.ParseImageID(id)
}

// secrets returns the credentials of a header, and the header itself. Errors of registries must not
// reveal them.
func secrets(header string) []string {
	a, err := authconfig.Decode(header)
	if err != nil || header == "" {
		return nil
	}

	login := secret.Login{
		Username:      a.Username,
		Password:      a.Password,
		Auth:          a.Auth,
		IdentityToken: a.IdentityToken,
		RegistryToken: a.RegistryToken,
	}

	return append(login.Secrets(), header)
}

// pull pulls an image and returns the image ID.
func (e *Engine) pull(ctx context.Context, ref, header string) (_ string, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	w := newWatchdog(e.cfg.PullDeadline, &e.activity, func(last string) {
		cancel(fmt.Errorf("no progress for %s (--image-pull-progress-deadline), last progress: %s: %w",
			e.cfg.PullDeadline, last, errdefs.ErrUnavailable))
	})
	defer w.stop()

	progress := newProgress(w, e.cfg.Log.With("image", ref), e.metrics)
	defer func() { progress.end(err) }()

	r, err := e.docker().ImagePull(ctx, ref, client.ImagePullOptions{RegistryAuth: header})
	if err != nil {
		return "", pullError(causeOr(ctx, err))
	}
	defer r.Close()

	err = tolerant.Sequence(r, messageLimits, func(m *jsonstream.Message) error {
		if m.Error != nil {
			return errors.New(text.Clean(m.Error.Message, text.MaxMessage))
		}
		progress.observe(*m)
		return nil
	})
	if err != nil {
		return "", pullError(causeOr(ctx, err))
	}

	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}

	in, err := e.inspectImage(ctx, ref)
	if err != nil {
		return "", wrap(err, "inspect pulled image")
	}

	return in.ID, nil
}

// pullErrors maps error messages of engines to the kind of the registry's or network's error. The
// first match wins. Only the text distinguishes them: Docker 20.10 reports most as status 500, and
// Docker 29 as "unknown". Docker 26 adds a response that lacks the content type of JSON as it is,
// with the codes of the OCI distribution specification (MANIFEST_UNKNOWN).
var pullErrors = []struct {
	pattern *regexp.Regexp
	kind    error
}{
	{regexp.MustCompile(`(?i)toomanyrequests|429 Too Many Requests`), errdefs.ErrUnavailable},
	{regexp.MustCompile(`(?i)\bunauthorized\b|\bdenied\b|no basic auth credentials|authorization failed|` +
		`401 Unauthorized|403 Forbidden|incorrect username or password`), errdefs.ErrPermissionDenied},
	{regexp.MustCompile(`(?i)(manifest|name|blob)[ _]unknown|\bnot found\b|no matching manifest|404 Not Found`),
		errdefs.ErrNotFound},
	{regexp.MustCompile(`(?i)connection refused|no such host|i/o timeout|Client\.Timeout|connection reset|` +
		`network is unreachable|no route to host|unexpected EOF|tls: |x509: |HTTP response to HTTPS client|` +
		`server misbehaving|HTTP status: 5\d\d|: 5\d\d [A-Z]`), errdefs.ErrUnavailable},
}

// pullError assigns a kind to the error of a pull, for the kubelet and for readers of its events.
func pullError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errdefs.IsUnavailable(err) {
		return err
	}

	for _, p := range pullErrors {
		if p.pattern.MatchString(err.Error()) {
			// Do not wrap err: for some of these the engine's own kind is NotFound or Internal.
			return fmt.Errorf("%s: %w", err.Error(), p.kind)
		}
	}

	return wrap(err, "engine")
}

// causeOr returns the cause of the cancellation of ctx, or err.
func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		return cause
	}
	return err
}

// authHeader returns the X-Registry-Auth header for CRI credentials, or "" without credentials.
func authHeader(a *runtimeapi.AuthConfig) (string, error) {
	if a == nil {
		return "", nil
	}

	c := registry.AuthConfig{
		Username:      a.GetUsername(),
		Password:      a.GetPassword(),
		ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(),
		RegistryToken: a.GetRegistryToken(),
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
