package cri

import (
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// encodings keeps what records are in lists, and in figures. Records never change, so one is encoded once.
type encodings[R any] struct {
	messages [kinds]func(*R) proto.Message
	short    func(*R) proto.Message // of an item in a list that would be too large

	mu    sync.Mutex // guards the rest
	known map[*R]*[kinds][]byte
}

// kind is what a record is encoded as: an item of a list, or the attributes of its figures. Both have the number wire.Items.
type kind int

const (
	asItem kind = iota
	asAttributes
	kinds
)

func newEncodings[R any](item, attributes, short func(*R) proto.Message) *encodings[R] {
	return &encodings[R]{messages: [kinds]func(*R) proto.Message{item, attributes}, short: short, known: map[*R]*[kinds][]byte{}}
}

// items are all records that match, as items of a list of at most limit bytes: the largest of a larger list are shortened.
func (e *encodings[R]) items(all []*R, matches func(*R) bool, limit int) ([]byte, error) {
	defer e.keep(all)
	records, found := make([]*R, 0, len(all)), make([][]byte, 0, len(all))
	for _, r := range all {
		if !matches(r) {
			continue
		}
		b, err := e.of(r, asItem)
		if err != nil {
			return nil, err
		}
		records, found = append(records, r), append(found, b)
	}
	size, err := shorten(found, limit, func(i int) ([]byte, error) { return wire.AppendItem(nil, e.short(records[i])) })
	if err != nil {
		return nil, err
	}
	items := wire.Room(size)
	for _, b := range found {
		items = append(items, b...)
	}
	return items, nil
}

// of is a record encoded. The bytes are shared: read only.
func (e *encodings[R]) of(r *R, k kind) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := e.known[r]
	if all == nil {
		all = &[kinds][]byte{}
		e.known[r] = all
	}
	if all[k] == nil {
		b, err := wire.AppendItem(nil, e.messages[k](r))
		if err != nil {
			return nil, err
		}
		all[k] = slices.Clip(b)
	}
	return all[k], nil
}

// gone is how many records that are gone may be kept beside as many as there are.
const gone = 32

// keep forgets what is not among all records there are, once it is much.
func (e *encodings[R]) keep(all []*R) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.known) <= 2*len(all)+gone {
		return
	}
	there := make(map[*R]*[kinds][]byte, len(all))
	for _, r := range all {
		if b := e.known[r]; b != nil {
			there[r] = b
		}
	}
	e.known = there
}
