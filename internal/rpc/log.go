package rpc

import (
	"context"
	"encoding/base64"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/text"
)

// write makes the call's log line: calls that change something at info, the polling at debug. Of a
// request only names and IDs are logged: the rest holds credentials and environments.
func (i interceptor) write(ctx context.Context, method string, req, resp any, took time.Duration, err error) {
	level := slog.LevelDebug
	if mutates(method) {
		level = slog.LevelInfo
	}

	attrs := slices.Concat(subject(req), made(resp), []slog.Attr{slog.Duration("took", took.Round(time.Microsecond))})
	if err != nil {
		code, text := status.Code(err), status.Convert(err).Message()
		attrs = append(attrs, slog.String("code", code.String()), slog.String("err", text))
		if (code == codes.Internal || code == codes.Unknown) &&
			(mutates(method) || i.repeats.news(method, text, time.Now())) {
			level = slog.LevelError
		}
	}

	i.log.LogAttrs(ctx, level, method, attrs...)
}

// sayAgain is how often an error of a polling call that stays the same is logged.
const sayAgain = 10 * time.Minute

// repeats knows what polling calls have failed with, since a kubelet asks every second: what nobody
// has read yet need not be said again.
type repeats struct {
	mu   sync.Mutex
	last map[string]failure // by method
}

type failure struct {
	text string
	at   time.Time
}

// news says whether a failure is another one than the last, or long enough ago.
func (r *repeats) news(method, text string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.last[method]; ok && old.text == text && now.Sub(old.at) < sayAgain {
		return false
	}
	r.last[method] = failure{text, now}
	return true
}

// subject is what a request is about.
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

// made is what an answer says has been made.
func made(resp any) []slog.Attr {
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

// mutates says whether a method changes something on the node, or gives somebody a way into a
// container.
func mutates(method string) bool {
	return slices.Contains([]string{
		"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "CreateContainer", "StartContainer", "StopContainer",
		"RemoveContainer",
		"UpdateContainerResources", "UpdatePodSandboxResources", "UpdateRuntimeConfig", "PullImage", "RemoveImage",
		"ReopenContainerLog",
		"CheckpointContainer", "CheckpointPod", "RestorePod", "Exec", "Attach", "PortForward",
	}, method)
}

// discreet is an error that carries a status, without secrets: neither those of the request nor
// what has the form of one, since engines pass on what registries answered.
func discreet(err error, req any) error {
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

// credentials are the secrets of a request (CRI AuthConfig), also as they are sent on.
func credentials(req any) []string {
	r, ok := req.(*runtimeapi.PullImageRequest)
	if !ok || r.GetAuth() == nil {
		return nil
	}

	a := r.GetAuth()
	known := []string{a.GetPassword(), a.GetAuth(), a.GetIdentityToken(), a.GetRegistryToken()}
	if a.GetPassword() != "" {
		known = append(known, base64.StdEncoding.EncodeToString([]byte(a.GetUsername()+":"+a.GetPassword())))
	}

	if plain, err := base64.StdEncoding.DecodeString(a.GetAuth()); err == nil {
		if _, password, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":"); ok {
			known = append(known, password)
		}
	}

	return known
}
