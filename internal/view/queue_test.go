package view

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"cri-dockerd/internal/model"
)

func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, begin := newQueue[model.ContainerID](), time.Now()
		take := func(want model.ContainerID, after time.Duration) {
			t.Helper()
			id, err := d.next(t.Context())
			if err != nil || id != want || time.Since(begin) != after {
				t.Errorf("%q, %v after %s; want %q after %s", id, err, time.Since(begin), want, after)
			}
		}

		d.add("started", settleTime)
		d.add("died", 0)
		d.add("odd", retryMin)
		d.add("forgotten", settleTime)
		d.add("odd", 2*retryMin)
		d.remove("forgotten")
		take("died", 0)
		time.AfterFunc(settleTime/2, func() { d.add("started", 0) }) // earlier than before
		take("started", settleTime/2)
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

// TestQueueSharesTheWork: after taking an element, a reader wakes another one for the remaining
// elements.
func TestQueueSharesTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, taken := newQueue[model.ContainerID](), make(chan model.ContainerID, 3)
		for range 3 {
			go func() {
				id, err := d.next(t.Context())
				if err != nil {
					t.Error(err)
				}
				taken <- id // the reader stays busy with it
			}()
		}

		synctest.Wait()
		for _, id := range []model.ContainerID{"a", "b", "c"} {
			d.add(id, settleTime)
		}

		time.Sleep(settleTime)
		synctest.Wait()
		if len(taken) != 3 {
			t.Errorf("%d of 3 elements were taken", len(taken))
		}
	})
}
