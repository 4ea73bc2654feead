package rpc

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/text"
)

// write logs a call: at info if it changes something, otherwise at debug. Only names and IDs of a
// request are logged, because other fields hold credentials and environments.
func (i interceptor) write(ctx context.Context, method string, req, resp any, took time.Duration, err error) {
	level := slog.LevelDebug
	if isMutating(method) {
		level = slog.LevelInfo
	}

	duration := slog.Duration("took", took.Round(time.Microsecond))
	attrs := slices.Concat(subject(req), created(resp), []slog.Attr{duration})
	if err != nil {
		code, text := status.Code(err), status.Convert(err).Message()
		attrs = append(attrs, slog.String("code", code.String()), slog.String("err", text))
		if (code == codes.Internal || code == codes.Unknown) &&
			(isMutating(method) || i.repeats.isNew(method, text, time.Now())) {
			level = slog.LevelError
		}
	}

	i.log.LogAttrs(ctx, level, method, attrs...)
}

// repeatInterval is the interval between log lines for an unchanged error of a polling call.
const repeatInterval = 10 * time.Minute

// repeats suppresses repeated errors of polling calls. A kubelet polls every second.
type repeats struct {
	mu   sync.Mutex
	last map[string]failure // by method
}

type failure struct {
	text string
	at   time.Time
}

// isNew reports whether an error differs from the previous one, or repeatInterval has passed.
func (r *repeats) isNew(method, text string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.last[method]; ok && old.text == text && now.Sub(old.at) < repeatInterval {
		return false
	}
	r.last[method] = failure{text, now}
	return true
}

// subject returns the names and IDs in a request.
func subject(req any) []slog.Attr {
	var a attrs
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		a.add("sandbox", r.GetPodSandboxId())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		a.add("container", r.GetContainerId())
	}

	switch r := req.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		a.add("namespace", r.GetConfig().GetMetadata().GetNamespace())
		a.add("pod", r.GetConfig().GetMetadata().GetName())
	case *runtimeapi.CreateContainerRequest:
		a.add("name", r.GetConfig().GetMetadata().GetName())
	case *runtimeapi.PullImageRequest:
		a.add("image", r.GetImage().GetImage())
	case *runtimeapi.RemoveImageRequest:
		a.add("image", r.GetImage().GetImage())
	}

	return a
}

// created returns the IDs of created objects in a response.
func created(resp any) []slog.Attr {
	var a attrs
	switch r := resp.(type) {
	case *runtimeapi.RunPodSandboxResponse:
		a.add("sandbox", r.GetPodSandboxId())
	case *runtimeapi.CreateContainerResponse:
		a.add("container", r.GetContainerId())
	case *runtimeapi.PullImageResponse:
		a.add("id", r.GetImageRef())
	}

	return a
}

type attrs []slog.Attr

func (a *attrs) add(key, value string) {
	if value != "" {
		*a = append(*a, slog.String(key, text.Clean(value, text.MaxName)))
	}
}

// isMutating reports whether a method changes something on the node, or gives access to a
// container.
func isMutating(method string) bool {
	return slices.Contains([]string{
		"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "UpdatePodSandboxResources",
		"CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "UpdateContainerResources",
		"PullImage", "RemoveImage",
		"ReopenContainerLog", "UpdateRuntimeConfig",
		"CheckpointContainer", "CheckpointPod", "RestorePod",
		"Exec", "Attach", "PortForward",
	}, method)
}

// maskSecrets masks the secrets in the text of a status error: those of the request, and any text
// in the form of a credential. Engines forward responses of registries.
func maskSecrets(err error, req any) error {
	if err == nil {
		return nil
	}

	s := status.Convert(err)
	text := secret.Mask(s.Message(), credentials(req)...)
	if text == s.Message() {
		return err
	}

	return status.Error(s.Code(), text)
}

// credentials returns the secrets of a request (CRI AuthConfig).
func credentials(req any) []string {
	r, ok := req.(*runtimeapi.PullImageRequest)
	if !ok || r.GetAuth() == nil {
		return nil
	}

	return secret.Login{
		Username:      r.GetAuth().GetUsername(),
		Password:      r.GetAuth().GetPassword(),
		Auth:          r.GetAuth().GetAuth(),
		IdentityToken: r.GetAuth().GetIdentityToken(),
		RegistryToken: r.GetAuth().GetRegistryToken(),
	}.Secrets()
}
