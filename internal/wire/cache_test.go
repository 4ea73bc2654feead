package wire

import (
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestCacheForgets: removed records are dropped after a while, and the remaining ones stay encoded.
func TestCacheForgets(t *testing.T) {
	type record struct{ name string }
	encoded := 0
	c := NewCache(func(r *record) proto.Message {
		encoded++
		return &runtimeapi.Container{Id: r.name}
	})

	list := func(all []*record) {
		for _, r := range all {
			if _, err := c.Item(r); err != nil {
				t.Fatal(err)
			}
		}
		c.Keep(all)
	}

	stays := &record{"stays"}
	for range 20 {
		all := []*record{stays}
		for range 9 {
			all = append(all, &record{"goes"})
		}
		list(all)
	}

	if len(c.known) > 2*10+maxRemoved {
		t.Errorf("%d records are kept, want 10", len(c.known))
	}
	if encoded != 1+20*9 {
		t.Errorf("encoded 181 records %d times", encoded)
	}
}
