package rpc

import (
	"fmt"
	"runtime/debug"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/text"
)

// maxErrorText is how long an error's text may be, in bytes. A kubelet stores it in events and in
// the status of pods.
const maxErrorText = 16 << 10

// bounded is an error that carries a status, with a text that is valid and not too long. All errors
// pass through it.
func bounded(err error) error {
	if err == nil {
		return nil
	}

	s := status.Convert(err)
	clean := text.Clean(s.Message(), maxErrorText)
	if clean == s.Message() {
		return err
	}

	return status.Error(s.Code(), clean)
}

// fits refuses an answer that the kubelet would refuse, which would see only its own error and no
// reason.
func (i interceptor) fits(name string, answer any) error {
	m, ok := answer.(proto.Message)
	if !ok {
		return nil
	}

	size := proto.Size(m)
	if size <= maxMessage {
		return nil
	}

	i.metrics.oversized.Inc()

	return status.Errorf(codes.ResourceExhausted, "%s: the answer has %d bytes; a kubelet takes at most %d. Remove "+
		"pods or images with much metadata, or name one of them in the request", name, size, maxMessage)
}

// logPanic logs a panic without the secrets of the request.
func (i interceptor) logPanic(fullMethod string, panicked, req any) {
	said := text.Clean(secret.Mask(fmt.Sprint(panicked), credentials(req)...), maxErrorText)
	i.log.Error("panic", "rpc", fullMethod, "panic", said, "stack", string(debug.Stack()))
}
