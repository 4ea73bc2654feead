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

// maxErrorText is the maximum size of an error's text in bytes. A kubelet stores it in events and
// in the status of pods.
const maxErrorText = 16 << 10

// limitText truncates and cleans the text of a status error. All errors pass through it.
func limitText(err error) error {
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

// checkSize rejects a response over the kubelet's limit. The kubelet would reject it without the
// reason.
func (i interceptor) checkSize(name string, resp any) error {
	m, ok := resp.(proto.Message)
	if !ok {
		return nil
	}

	size := proto.Size(m)
	if size <= maxMessage {
		return nil
	}

	i.metrics.oversized.Inc()

	return status.Errorf(codes.ResourceExhausted, "%s: the response has %d bytes; a kubelet accepts at most %d. "+
		"Remove pods or images with large metadata, or select one of them in the request", name, size, maxMessage)
}

// logPanic logs a panic without the secrets of the request.
func (i interceptor) logPanic(fullMethod string, panicked, req any) {
	message := text.Clean(secret.Mask(fmt.Sprint(panicked), credentials(req)...), maxErrorText)
	i.log.Error("panic", "rpc", fullMethod, "panic", message, "stack", string(debug.Stack()))
}
