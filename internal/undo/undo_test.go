package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

func TestRunIsNewestFirstDespiteErrorsAndCancellation(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var order []string
	boom := errors.New("boom")
	var s Stack
	s.Push("first", func(ctx context.Context) error { order = append(order, "first"); return ctx.Err() })
	s.Push("second", func(context.Context) error { order = append(order, "second"); return boom })
	err := s.Run(ctx, time.Minute)
	if !slices.Equal(order, []string{"second", "first"}) {
		t.Errorf("order %v", order)
	}
	if !errors.Is(err, boom) || errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}

	if err := s.Run(ctx, time.Minute); err != nil || len(order) != 2 {
		t.Errorf("a second Run was not a no-op: %v, %v", order, err)
	}
}

func TestRelease(t *testing.T) {
	var s Stack
	s.Push("x", func(context.Context) error { t.Error("Run after Release ran a step"); return nil })
	s.Release()
	if err := s.Run(t.Context(), time.Minute); err != nil {
		t.Error(err)
	}
}

func TestDeadline(t *testing.T) {
	var s Stack
	s.Push("slow", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	if err := s.Run(t.Context(), time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}
