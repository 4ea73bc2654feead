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

// gRPC buffers a response until the client reads it. To bound the daemon's memory if a client stops
// reading, each connection has a few slots for large responses. A slot is released when the
// response was written to the connection.
const (
	// responseSlots is the number of slots of a connection. A kubelet sends at most four list
	// requests at a time.
	responseSlots = 6
	// largeResponse is the minimum size in bytes of a response with a slot. Lists need a slot at
	// any size.
	largeResponse = 64 << 10
	// slotTimeout limits the wait of a large response for a slot.
	slotTimeout = 10 * time.Second
)

// connectionKey is the key of a connection's slots in the contexts of its calls.
type connectionKey struct{}

// tagger adds the slots of a connection to the contexts of its calls. It implements stats.Handler.
type tagger struct{}

func (tagger) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context {
	return context.WithValue(ctx, connectionKey{}, make(chan struct{}, responseSlots))
}

func (tagger) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (tagger) HandleRPC(context.Context, stats.RPCStats)                       {}
func (tagger) HandleConn(context.Context, stats.ConnStats)                     {}

// acquireSlot acquires a slot of the call's connection, or returns the error of ctx.
func acquireSlot(ctx context.Context) (release func(), err error) {
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

// isList reports whether the responses of a method grow with the number of objects on the node.
func isList(method string) bool {
	return strings.HasPrefix(method, "List") || strings.HasPrefix(method, "Stream")
}

// holdResponse returns a response that keeps its slot until it was written. release releases the
// slot of a list; it is nil for other methods.
func holdResponse(ctx context.Context, method string, resp any, release func()) (any, error) {
	m, ok := resp.(proto.Message)
	if !ok {
		return resp, nil
	}

	if release == nil && proto.Size(m) >= largeResponse {
		ctx, cancel := context.WithTimeout(ctx, slotTimeout)
		defer cancel()

		var err error
		if release, err = acquireSlot(ctx); err != nil {
			return nil, status.Errorf(codes.ResourceExhausted,
				"%s: the client did not read %d large responses on this connection within %s", method, responseSlots,
				slotTimeout)
		}
	}

	if release == nil {
		return resp, nil
	}

	return &heldResponse{Message: m, release: release}, nil
}

// heldResponse is a response with a slot.
type heldResponse struct {
	proto.Message
	release func()
}

// responsePool reclaims the memory of a response after it was written or its connection was closed.
type responsePool struct {
	release func() // releases the slot; nil without one
}

// Get implements mem.BufferPool. gRPC does not call it: package wire allocates the memory.
func (responsePool) Get(length int) *[]byte {
	b := make([]byte, length)
	return &b
}

// Put implements mem.BufferPool.
func (p responsePool) Put(b *[]byte) {
	wire.Release(*b)
	if p.release != nil {
		p.release()
	}
}
