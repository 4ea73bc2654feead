package rpc

import (
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// codec is the protobuf codec. It sends encoded responses (package wire) without a copy and takes
// ownership of their memory.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

// Marshal encodes a response.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	held, ok := v.(*heldResponse)
	if !ok {
		return c.marshal(v, nil)
	}

	out, err := c.marshal(held.Message, held.release)
	if err != nil {
		held.release()
	}

	return out, err
}

// marshal encodes a response and calls release when the result was written. release may be nil.
func (c codec) marshal(v any, release func()) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	if items, ok := wire.Encoded(m); ok {
		return pooled(items, release), nil
	}

	out, err := c.CodecV2.Marshal(m)
	if err != nil {
		valid, changed := wire.Valid(m)
		if !changed {
			return nil, err
		}
		// One invalid UTF-8 text must not fail the response.
		if out, err = c.CodecV2.Marshal(valid); err != nil {
			return nil, err
		}
	}

	if release == nil {
		return out, nil
	}
	defer out.Free()

	return pooled(out.Materialize(), release), nil
}

// pooled returns data as a buffer. It is released when gRPC has written it.
func pooled(data []byte, release func()) mem.BufferSlice {
	if release != nil && mem.IsBelowBufferPoolingThreshold(cap(data)) {
		release() // gRPC does not return small buffers to a pool
	}
	return mem.BufferSlice{mem.NewBuffer(&data, responsePool{release})}
}
