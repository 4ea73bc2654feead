package rpc

import (
	"context"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// gRPC keeps an answer in memory until the client reads it. A client that stops reading must not
// grow the daemon, so each connection has a few slots for large answers. A slot is free again when
// the answer was written to the connection.
const (
	// largeAnswers is the number of slots of a connection. A kubelet makes at most four lists at a
	// time.
	largeAnswers = 6
	// largeAnswer is the size in bytes from which an answer needs a slot. Lists need one at any
	// size.
	largeAnswer = 64 << 10
	// answerTimeout is how long a large answer waits for a slot.
	answerTimeout = 10 * time.Second
)

// connectionKey is the key of a connection's slots in the contexts of its calls.
type connectionKey struct{}

// tagger puts the slots of a connection into the contexts of its calls. It implements
// stats.Handler.
type tagger struct{}

func (tagger) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context {
	return context.WithValue(ctx, connectionKey{}, make(chan struct{}, largeAnswers))
}

func (tagger) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (tagger) HandleRPC(context.Context, stats.RPCStats)                       {}
func (tagger) HandleConn(context.Context, stats.ConnStats)                     {}

// acquireAnswer takes a slot of the call's connection. It fails when ctx ends.
func acquireAnswer(ctx context.Context) (release func(), err error) {
	slots, ok := ctx.Value(connectionKey{}).(chan struct{})
	if !ok {
		return func() {}, nil
	}

	select {
	case slots <- struct{}{}:
		return sync.OnceFunc(func() { <-slots }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// isList returns whether the answers of a method grow with the number of objects on the node.
func isList(method string) bool {
	return strings.HasPrefix(method, "List") || strings.HasPrefix(method, "Stream")
}

// holdAnswer returns an answer that keeps its slot until it was written. release is the slot of a
// list, nil for other methods.
func holdAnswer(ctx context.Context, method string, answer any, release func()) (any, error) {
	m, ok := answer.(proto.Message)
	if !ok {
		return answer, nil
	}

	if release == nil && proto.Size(m) >= largeAnswer {
		ctx, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()

		var err error
		if release, err = acquireAnswer(ctx); err != nil {
			return nil, status.Errorf(codes.ResourceExhausted,
				"%s: the client has not read %d large answers on this connection for %s", method, largeAnswers,
				answerTimeout)
		}
	}

	if release == nil {
		return answer, nil
	}

	return &heldAnswer{Message: m, release: release}, nil
}

// heldAnswer is an answer that has a slot.
type heldAnswer struct {
	proto.Message
	release func()
}

// answerPool gets back the memory of an answer that was written, or whose connection has ended.
type answerPool struct {
	release func() // nil: none
}

// Get implements mem.BufferPool. gRPC does not call it: the memory comes from package wire.
func (answerPool) Get(length int) *[]byte {
	b := make([]byte, length)
	return &b
}

// Put implements mem.BufferPool.
func (p answerPool) Put(b *[]byte) {
	wire.Release(*b)
	if p.release != nil {
		p.release()
	}
}
