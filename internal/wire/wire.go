// Package wire has answers that are encoded before gRPC sees them. Lists are asked for every second
// and are nearly always the same, and the metrics of a node are many thousand small messages: to
// make protobuf's objects of them, and to encode those, is most of what such calls would cost. So
// their answers carry the items encoded already, as what protobuf calls unknown fields, which it
// sends as they are. To who decodes the answer they are what they always were.
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

// AppendItem appends a message as an item of a list. Texts in it that are not UTF-8 are appended as
// valid ones.
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

// AppendField appends a field that is a message, which is encoded already.
func AppendField(b []byte, f Field, message []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, f, protowire.BytesType), message)
}

// AppendText appends a field that is a text. What is not UTF-8, as names of network devices need
// not be, would make the whole answer unreadable, and is replaced.
func AppendText(b []byte, f Field, s string) []byte {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, string(utf8.RuneError))
	}
	return protowire.AppendString(protowire.AppendTag(b, f, protowire.BytesType), s)
}

// AppendNumber appends a field that is a number of any kind but a fixed or zigzag one. Protobuf
// leaves out what is zero.
func AppendNumber(b []byte, f Field, n uint64) []byte {
	if n == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, f, protowire.VarintType), n)
}

// AppendWrapped appends a field that is a message with a number in its first field, as UInt64Value.
func AppendWrapped(b []byte, f Field, n uint64) []byte {
	b = protowire.AppendTag(b, f, protowire.BytesType)
	if n == 0 {
		return protowire.AppendVarint(b, 0)
	}
	return AppendNumber(protowire.AppendVarint(b, uint64(protowire.SizeTag(1)+protowire.SizeVarint(n))), 1, n)
}

// Carry gives a message fields that are encoded already. Of an empty answer they belong to it from
// then on: who sends it releases them.
func Carry[M proto.Message](m M, fields []byte) M {
	m.ProtoReflect().SetUnknown(fields)
	return m
}

// Carried is what an answer carries, if it has nothing else.
func Carried(answer proto.Message) (items []byte, ok bool) {
	items = answer.ProtoReflect().GetUnknown()
	return items, len(items) > 0 && proto.Size(answer) == len(items)
}

// Pages sends items in answers of at most so many bytes, or of one item that is larger, each with a
// copy of its own, and releases the items.
func Pages(items []byte, most int, send func(page []byte) error) error {
	defer Release(items)

	for len(items) > 0 {
		n := 0
		for n < len(items) {
			_, _, size := protowire.ConsumeField(items[n:])
			if size < 0 {
				return protowire.ParseError(size)
			}
			if n > 0 && n+size > most {
				break
			}

			n += size
		}

		if err := send(append(Room(n), items[:n]...)); err != nil {
			return err
		}

		items = items[n:]
	}

	return nil
}

// roomy is from how many bytes on an answer's memory is used again. To take it anew each time makes
// the garbage collector run more often, with large answers within the call.
const roomy = 4 << 10

// rooms are the memory of answers that have been sent, by the power of two that it has at least.
var rooms [bits.UintSize + 1]sync.Pool

// Room is empty memory for an answer of so many bytes.
func Room(bytes int) []byte {
	if bytes < roomy {
		return make([]byte, 0, bytes)
	}

	power := bits.Len(uint(bytes - 1))
	if b, ok := rooms[power].Get().(*[]byte); ok {
		return (*b)[:0]
	}

	return make([]byte, 0, 1<<power)
}

// Release gives back the memory of an answer that has been sent.
func Release(b []byte) {
	if cap(b) >= roomy {
		rooms[bits.Len(uint(cap(b)))-1].Put(&b)
	}
}
