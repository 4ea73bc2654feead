package cri

import (
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/wire"
)

// encodings make lists of records, each of which is encoded once.
type encodings[R any] struct {
	cache *wire.Cache[R]
	short func(*R) proto.Message // of an item in a list that would be too large
}

func newEncodings[R any](item, short func(*R) proto.Message) *encodings[R] {
	return &encodings[R]{cache: wire.NewCache(item), short: short}
}

// items are all records that match, as items of a list of at most limit bytes: the largest of a
// larger list are shortened.
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

	items := wire.Room(size)
	for _, b := range found {
		items = append(items, b...)
	}

	return items, nil
}
