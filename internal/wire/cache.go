package wire

import (
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"
)

// Cache keeps records encoded as items of a list. Records never change, so each is encoded once. It
// is safe for concurrent use.
type Cache[R any] struct {
	message func(*R) proto.Message

	mu    sync.Mutex // guards known
	known map[*R][]byte
}

// NewCache returns an empty cache. message converts a record to its message in the list.
func NewCache[R any](message func(*R) proto.Message) *Cache[R] {
	return &Cache[R]{message: message, known: map[*R][]byte{}}
}

// Item returns a record encoded as an item of a list. The bytes are shared: read only.
func (c *Cache[R]) Item(r *R) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()

	if b := c.known[r]; b != nil {
		return b, nil
	}

	b, err := AppendItem(nil, c.message(r))
	if err != nil {
		return nil, err
	}

	b = slices.Clip(b)
	c.known[r] = b

	return b, nil
}

// maxRemoved is the allowance for removed records in a cache, beside one per existing record.
const maxRemoved = 32

// Keep drops the records not in all, once there are many of them.
func (c *Cache[R]) Keep(all []*R) {
	c.mu.Lock()
	defer c.mu.Unlock()

	if len(c.known) <= 2*len(all)+maxRemoved {
		return
	}

	kept := make(map[*R][]byte, len(all))
	for _, r := range all {
		if b := c.known[r]; b != nil {
			kept[r] = b
		}
	}

	c.known = kept
}
