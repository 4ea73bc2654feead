package cri

import (
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// encodings builds lists of records from cached encodings of their items.
type encodings[R any] struct {
	cache *wire.Cache[R]
	short func(*R) proto.Message // the short form of an item, for oversized lists
}

func newEncodings[R any](item, short func(*R) proto.Message) *encodings[R] {
	return &encodings[R]{cache: wire.NewCache(item), short: short}
}

// items returns all matching records as list items of at most limit bytes. It shortens the largest
// items if necessary.
func (e *encodings[R]) items(all []*R, matches func(*R) bool, limit int) ([]byte, error) {
	defer e.cache.Keep(all)

	records, found := make([]*R, 0, len(all)), make([][]byte, 0, len(all))
	for _, r := range all {
		if !matches(r) {
			continue
		}

		b, err := e.cache.Item(r)
		if err != nil {
			return nil, err
		}

		records, found = append(records, r), append(found, b)
	}

	size, err := shorten(found, limit, func(i int) ([]byte, error) {
		return wire.AppendItem(nil, e.short(records[i]))
	})
	if err != nil {
		return nil, err
	}

	items := wire.NewBuffer(size)
	for _, b := range found {
		items = append(items, b...)
	}

	return items, nil
}
