// Package wire provides responses encoded before gRPC handles them. The kubelet requests lists
// every second, nearly always with the same content, and the metrics of a node are many thousand
// small messages. Creating and encoding protobuf objects would be most of the cost of such calls.
// So their responses carry already encoded items as unknown fields, and protobuf sends these
// unchanged. Clients decode these responses like any other.
package wire

import (
	"math/bits"
	"strings"
	"sync"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Field is a field's number in api.proto.
type Field = protowire.Number

// Items is the field of the items in all lists of the CRI.
const Items Field = 1

// AppendItem appends a message as an item of a list. It replaces invalid UTF-8 in its strings.
func AppendItem(b []byte, m proto.Message) ([]byte, error) {
	begin := len(b)
	b = protowire.AppendTag(b, Items, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(proto.Size(m)))
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, m)
	if err == nil {
		return out, nil
	}

	valid, changed := Valid(m)
	if !changed {
		return nil, err
	}

	return AppendItem(b[:begin], valid)
}

// AppendField appends an already encoded message as a field.
func AppendField(b []byte, f Field, message []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, f, protowire.BytesType), message)
}

// AppendText appends a string field. It replaces invalid UTF-8, possible for example in names of
// network devices, since it would make the whole response unreadable.
func AppendText(b []byte, f Field, s string) []byte {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, string(utf8.RuneError))
	}
	return protowire.AppendString(protowire.AppendTag(b, f, protowire.BytesType), s)
}

// AppendNumber appends a number field of any kind except fixed and zigzag. Like protobuf, it omits
// zero.
func AppendNumber(b []byte, f Field, n uint64) []byte {
	if n == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, f, protowire.VarintType), n)
}

// AppendWrapped appends a message field with a number in its first field, such as UInt64Value.
func AppendWrapped(b []byte, f Field, n uint64) []byte {
	b = protowire.AppendTag(b, f, protowire.BytesType)
	if n == 0 {
		return protowire.AppendVarint(b, 0)
	}
	return AppendNumber(protowire.AppendVarint(b, uint64(protowire.SizeTag(1)+protowire.SizeVarint(n))), 1, n)
}

// WithEncoded adds already encoded fields to a message. An otherwise empty response owns them from
// then on: its sender releases them.
func WithEncoded[M proto.Message](m M, fields []byte) M {
	m.ProtoReflect().SetUnknown(fields)
	return m
}

// Encoded returns the encoded fields of a response, and whether it has nothing else.
func Encoded(response proto.Message) (items []byte, ok bool) {
	items = response.ProtoReflect().GetUnknown()
	return items, len(items) > 0 && proto.Size(response) == len(items)
}

// SendPages sends items in responses of at most limit bytes, or of one larger item. Each response
// has its own copy. SendPages releases the items.
func SendPages(items []byte, limit int, send func(page []byte) error) error {
	defer Release(items)

	for len(items) > 0 {
		n := 0
		for n < len(items) {
			_, _, size := protowire.ConsumeField(items[n:])
			if size < 0 {
				return protowire.ParseError(size)
			}
			if n > 0 && n+size > limit {
				break
			}

			n += size
		}

		if err := send(append(NewBuffer(n), items[:n]...)); err != nil {
			return err
		}

		items = items[n:]
	}

	return nil
}

// minReused is the smallest size in bytes of reused memory. Allocating large responses anew makes
// the garbage collector run more often, even within the call.
const minReused = 4 << 10

// pools holds the memory of sent responses, by the power of two of its minimum size.
var pools [bits.UintSize + 1]sync.Pool

// NewBuffer returns empty memory for a response of this many bytes.
func NewBuffer(bytes int) []byte {
	if bytes < minReused {
		return make([]byte, 0, bytes)
	}

	power := bits.Len(uint(bytes - 1))
	if b, ok := pools[power].Get().(*[]byte); ok {
		return (*b)[:0]
	}

	return make([]byte, 0, 1<<power)
}

// Release makes the memory of a sent response available again.
func Release(b []byte) {
	if cap(b) >= minReused {
		pools[bits.Len(uint(cap(b)))-1].Put(&b)
	}
}
