package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// frame is one message from Docker: a line of a container, or a piece of a long line. In the FIFO
// each frame follows its length, four bytes in big-endian order.
type frame struct {
	Source  string // "stdout" or "stderr"
	Time    int64  // in nanoseconds since 1970
	Line    []byte // without newline; refers to the decoded buffer
	Partial bool   // more of the line follows
}

const (
	prefixSize = 4
	// maxFrame exceeds the size of Docker's messages, because Docker cuts lines at 16 KiB. A
	// greater length is invalid.
	maxFrame = batchSize - prefixSize
)

// Field numbers of LogEntry and PartialLogEntryMetadata in moby's entry.proto.
const (
	fieldSource   protowire.Number = 1
	fieldTime     protowire.Number = 2
	fieldLine     protowire.Number = 3
	fieldPartial  protowire.Number = 4
	fieldMetadata protowire.Number = 5
	fieldLast     protowire.Number = 1
)

var errMalformed = errors.New("malformed message from Docker")

// nextFrame decodes the first frame of b and returns its length, including the prefix. It returns
// errIncomplete if b ends within the frame, and errMalformed for anything but a frame from Docker.
// The length is 0 if unknown.
func nextFrame(b []byte) (f frame, n int, err error) {
	if len(b) < prefixSize {
		return f, 0, errIncomplete
	}

	size := binary.BigEndian.Uint32(b)
	if size > maxFrame {
		return f, 0, fmt.Errorf("%w: %d bytes", errMalformed, size)
	}

	n = prefixSize + int(size)
	if len(b) < n {
		return f, 0, errIncomplete
	}

	f, err = decode(b[prefixSize:n])

	return f, n, err
}

func decode(b []byte) (f frame, err error) {
	last := false
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return f, fmt.Errorf("%w: %w", errMalformed, protowire.ParseError(n))
		}

		b = b[n:]
		switch {
		case typ == protowire.BytesType && (num == fieldSource || num == fieldLine || num == fieldMetadata):
			var v []byte
			v, n = protowire.ConsumeBytes(b)
			if n < 0 {
				break
			}
			switch num {
			case fieldSource:
				f.Source = sourceName(v)
			case fieldLine:
				f.Line = v
			default:
				last = isLast(v)
			}

		case typ == protowire.VarintType && (num == fieldTime || num == fieldPartial):
			var v uint64
			v, n = protowire.ConsumeVarint(b)
			if num == fieldTime {
				f.Time = int64(v)
			} else {
				f.Partial = v != 0
			}

		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}

		if n < 0 {
			return f, fmt.Errorf("%w: %w", errMalformed, protowire.ParseError(n))
		}

		b = b[n:]
	}

	f.Partial = f.Partial && !last

	return f, nil
}

// sourceName returns one of the two names without an allocation.
func sourceName(v []byte) string {
	if string(v) == "stderr" {
		return "stderr"
	}
	return "stdout"
}

// isLast decodes PartialLogEntryMetadata. Docker marks the last piece of a line as partial as well.
func isLast(b []byte) bool {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}

		if b = b[n:]; num == fieldLast && typ == protowire.VarintType {
			v, n := protowire.ConsumeVarint(b)
			return n > 0 && v != 0
		}

		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return false
		}

		b = b[n:]
	}

	return false
}

// appendFrame appends a frame in Docker's format (LogDriver.ReadLogs). Docker prints the line
// unchanged.
func appendFrame(b []byte, f frame) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0)
	b = protowire.AppendTag(b, fieldSource, protowire.BytesType)
	b = protowire.AppendString(b, f.Source)
	b = protowire.AppendTag(b, fieldTime, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(f.Time))
	b = protowire.AppendTag(b, fieldLine, protowire.BytesType)
	b = protowire.AppendBytes(b, f.Line)
	if f.Partial {
		b = protowire.AppendTag(b, fieldPartial, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
	}

	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-prefixSize))

	return b
}

// Tags of the CRI's log format: the end of a line, or a piece of one.
const (
	tagFull    = "F"
	tagPartial = "P"
)

// pieceSize is the maximum length of a record's text, in bytes. The kubelet's readers have no
// limit, but all runtimes use this one.
const pieceSize = 16 << 10

// timeLayout is RFC 3339 with exactly nine digits, so that lines sort. The kubelet and log
// collectors accept any number of digits.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// clock formats times in the machine's time zone, like all runtimes. It caches the last second,
// because most lines share it.
type clock struct {
	second       int64
	before, zone []byte // the text before and after the nine digits
}

func (c *clock) append(b []byte, nano int64) []byte {
	second, fraction := nano/1e9, nano%1e9
	if fraction < 0 {
		second, fraction = second-1, fraction+1e9
	}

	if second != c.second || c.before == nil {
		const digits = len("000000000")
		text := time.Unix(second, 0).Format(timeLayout)
		at := len("2006-01-02T15:04:05.")
		c.second, c.before, c.zone = second, []byte(text[:at]), []byte(text[at+digits:])
	}

	b = append(b, c.before...)
	for div := int64(1e8); div > 0; div /= 10 {
		b = append(b, byte('0'+fraction/div%10))
	}

	return append(b, c.zone...)
}

// appendRecords appends a frame in the CRI's log format (KEP-1112 and kubelet's logs.go):
//
//	<time> stdout|stderr F|P <text>\n
func (c *clock) appendRecords(b []byte, f frame) []byte {
	for line := f.Line; ; line = line[pieceSize:] {
		piece, tag := line, tagFull
		if len(line) > pieceSize {
			piece, tag = line[:pieceSize], tagPartial
		} else if f.Partial {
			tag = tagPartial
		}

		b = c.append(b, f.Time)
		b = append(b, ' ')
		b = append(b, f.Source...)
		b = append(b, ' ')
		b = append(b, tag...)
		b = append(b, ' ')
		b = append(b, piece...)
		b = append(b, '\n')
		if len(piece) == len(line) {
			return b
		}
	}
}
