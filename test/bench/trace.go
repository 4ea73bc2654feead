package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// traced are the calls whose steps are printed.
var traced = []operation{"RunPodSandbox", "CreateContainer", "StartContainer"}

// timedCall is one call with the time of its begin and end.
type timedCall struct {
	op         operation
	begin, end time.Time
}

// trace prints where the time of the calls goes. The steps are the events of containerd, which has
// one for each of its objects: snapshots, containers and tasks. What a step does lies before its
// event.
func (b *containerdBench) trace(ctx context.Context, pods int) {
	fmt.Println("| call | step, until | runtime | p50 |\n|---|---|---|---:|")
	for _, one := range b.sides() {
		events := b.watchEvents(ctx, one)
		var calls []timedCall
		for i := range pods {
			_, err := timePod(ctx, one.runtime, one.image, b.podConfig(fmt.Sprintf("trace-%s-%d", one.name, i)),
				func(op operation, begin, end time.Time) { calls = append(calls, timedCall{op, begin, end}) })
			if err != nil {
				b.h.Fatalf("bench: %s: %v", one.name, err)
			}
		}

		all := events()
		for _, op := range traced {
			printSteps(one.name, op, calls, all)
		}
	}

	fmt.Println()
}

// response names the last step of a call.
const response = "response"

// eventDelay is the longest delay of an event.
const eventDelay = time.Second

// watchEvents collects the events of a runtime's containerd until the call of the returned
// function, which returns them in the order of their times.
func (b *containerdBench) watchEvents(ctx context.Context, s side) (stop func() []*types.Envelope) {
	conn, err := grpc.NewClient("unix://"+s.containerd, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.h.Fatalf("bench: %s: %v", s.containerd, err)
	}

	ctx, cancel := context.WithCancel(ctx)
	stream, err := eventsapi.NewEventsClient(conn).Subscribe(ctx,
		&eventsapi.SubscribeRequest{Filters: []string{"namespace==" + s.shim}}, grpc.WaitForReady(true))
	if err != nil {
		b.h.Fatalf("bench: events of %s: %v", s.containerd, err)
	}

	var all []*types.Envelope
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			all = append(all, e)
		}
	})

	return func() []*types.Envelope {
		time.Sleep(eventDelay)
		cancel()
		reader.Wait()
		_ = conn.Close()
		slices.SortFunc(all, func(a, b *types.Envelope) int {
			return a.GetTimestamp().AsTime().Compare(b.GetTimestamp().AsTime())
		})
		return all
	}
}

// printSteps prints the steps of an operation: those of the most frequent sequence of events.
func printSteps(runtime string, op operation, calls []timedCall, events []*types.Envelope) {
	steps := map[string][][]time.Duration{} // by topics, then by step
	for _, c := range calls {
		if c.op != op {
			continue
		}

		var topics []string
		var times []time.Duration
		last := c.begin
		for _, e := range events {
			if at := e.GetTimestamp().AsTime(); at.After(c.begin) && at.Before(c.end) {
				topics, times = append(topics, e.GetTopic()), append(times, at.Sub(last))
				last = at
			}
		}

		key := strings.Join(append(topics, response), " ")
		steps[key] = append(steps[key], append(times, c.end.Sub(last)))
	}

	most := ""
	for key, all := range steps {
		if len(all) > len(steps[most]) {
			most = key
		}
	}

	for i, topic := range strings.Fields(most) {
		var times []time.Duration
		for _, one := range steps[most] {
			times = append(times, one[i])
		}
		fmt.Printf("| %s | %s | %s | %s |\n", op, topic, runtime, ms(quantile(times, 50)))
	}
}
