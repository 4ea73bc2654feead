package rpc

import (
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// codec is protobuf's. Answers that are encoded already are sent without a copy; the codec takes
// ownership of their memory.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

// Marshal encodes an answer.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	held, ok := v.(*heldAnswer)
	if !ok {
		return c.marshal(v, nil)
	}

	out, err := c.marshal(held.Message, held.release)
	if err != nil {
		held.release()
	}

	return out, err
}

// marshal encodes an answer. It calls release, which may be nil, when the result was written.
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
		// One text that is not UTF-8 must not cost the answer.
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

// pooled returns data as a buffer that is released when gRPC has written it.
func pooled(data []byte, release func()) mem.BufferSlice {
	if release != nil && mem.IsBelowBufferPoolingThreshold(cap(data)) {
		release() // gRPC does not return so little to a pool
	}
	return mem.BufferSlice{mem.NewBuffer(&data, answerPool{release})}
}
