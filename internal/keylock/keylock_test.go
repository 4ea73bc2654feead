package keylock

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestExclusionPerKey(t *testing.T) {
	m := New()
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for range 100 {
		for key, n := range counts {
			wg.Go(func() {
				unlock, err := m.Lock(t.Context(), key)
				if err != nil {
					t.Error(err)
					return
				}
				defer unlock()
				*n++ // the race detector fails here without exclusion
			})
		}
	}

	wg.Wait()
	if *counts["a"] != 100 || *counts["b"] != 100 || len(m.locks) != 0 {
		t.Errorf("counts %d, %d; %d locks remain", *counts["a"], *counts["b"], len(m.locks))
	}
}

func TestLockStopsWithContext(t *testing.T) {
	m := New()
	unlock, err := m.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}

	unlock()
	if len(m.locks) != 0 {
		t.Errorf("%d locks remain", len(m.locks))
	}
}
