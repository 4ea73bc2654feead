package node

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"cri-dockerd/internal/model"
)

func TestDirtySet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, begin := newDirtySet(), time.Now()
		take := func(want model.ContainerID, after time.Duration) {
			t.Helper()
			id, err := d.next(t.Context())
			if err != nil || id != want || time.Since(begin) != after {
				t.Errorf("%q, %v after %s; want %q after %s", id, err, time.Since(begin), want, after)
			}
		}
		d.mark("started", settle)
		d.mark("died", 0)
		d.mark("odd", retryMin)
		d.mark("forgotten", settle)
		d.mark("odd", 2*retryMin)
		d.forget("forgotten")
		take("died", 0)
		time.AfterFunc(settle/2, func() { d.mark("started", 0) }) // sooner than it was
		take("started", settle/2)
		take("odd", retryMin)
		ended := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, err := d.next(ctx); ended <- err }()
		synctest.Wait()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestDirtySetSharesTheWork: who takes something wakes another for the rest.
func TestDirtySetSharesTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, taken := newDirtySet(), make(chan model.ContainerID, 3)
		for range 3 {
			go func() {
				id, err := d.next(t.Context())
				if err != nil {
					t.Error(err)
				}
				taken <- id // and is busy with it from now on
			}()
		}
		synctest.Wait()
		for _, id := range []model.ContainerID{"a", "b", "c"} {
			d.mark(id, settle)
		}
		time.Sleep(settle)
		synctest.Wait()
		if len(taken) != 3 {
			t.Errorf("%d of 3 were taken", len(taken))
		}
	})
}
