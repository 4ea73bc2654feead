package rpc

import (
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// codec is protobuf, but that answers which are encoded already are sent from where they lie. It takes possession of what they carry.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

// Marshal encodes an answer.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(proto.Message); ok {
		if items, ok := wire.Carried(m); ok {
			return mem.BufferSlice{mem.NewBuffer(&items, sent{})}, nil
		}
	}
	out, err := c.CodecV2.Marshal(v)
	if m, ok := v.(proto.Message); ok && err != nil {
		if valid, changed := wire.Valid(m); changed { // one text that is not UTF-8 must not cost the answer
			return c.CodecV2.Marshal(valid)
		}
	}
	return out, err
}

// sent takes back the memory of answers that have been sent.
type sent struct{}

// Get is not asked for: the memory comes from package wire.
func (sent) Get(length int) *[]byte {
	b := make([]byte, length)
	return &b
}

// Put gets what has been sent.
func (sent) Put(b *[]byte) { wire.Release(*b) }
