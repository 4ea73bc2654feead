// Command kubeletread reads a CRI runtime with the kubelet's own code: pods and their states,
// images, stats from the CRI only and combined with cAdvisor, metrics, events. It crashes if a
// response would crash a kubelet.
//
//	kubeletread ENDPOINT         reads in a loop until the end of standard input, then prints
//	                             the number of rounds and the errors of the kubelet's code
//	kubeletread -dereferences    prints the messages dereferenced by the kubelet's code without
//	                             a check: it panics if one is missing
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
	"k8s.io/klog/v2"
)

// dialTimeout limits each connection attempt to the runtime.
const dialTimeout = 10 * time.Second

// interval is the delay between two rounds, to leave time for other clients of the runtime.
const interval = 10 * time.Millisecond

func main() {
	dereferences := flag.Bool("dereferences", false, "print the messages dereferenced without a check")
	flag.Parse()
	klog.SetLogger(klog.New(nil)) // the result contains the errors

	var err error
	switch {
	case *dereferences:
		err = printDereferences(context.Background())
	case flag.NArg() == 1:
		err = read(context.Background(), flag.Arg(0))
	default:
		flag.Usage()
		os.Exit(2)
	}

	if err != nil {
		fmt.Fprintln(os.Stderr, "kubeletread:", err)
		os.Exit(1)
	}
}

// result is the result of reading a runtime.
type result struct {
	Rounds int            // number of complete reads
	Pods   int            // number of pods in all rounds
	Events int            // number of received events
	Errors map[string]int // number of errors by message
}

// read reads the runtime at an endpoint until standard input ends.
func read(ctx context.Context, endpoint string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	runtime, err := remote.NewRemoteRuntimeService(ctx, endpoint, dialTimeout, noop.NewTracerProvider(), false)
	if err != nil {
		return err
	}

	images, err := remote.NewRemoteImageService(ctx, endpoint, dialTimeout, noop.NewTracerProvider(), false)
	if err != nil {
		return err
	}

	k, err := newKubelet(ctx, runtime, images)
	if err != nil {
		return err
	}
	defer k.close()

	var ended atomic.Bool
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		ended.Store(true)
	}()

	events, err := watch(ctx, k, runtime)
	if err != nil {
		return err
	}

	out := result{Errors: map[string]int{}}
	for ; !ended.Load(); time.Sleep(interval) {
		pods, errs := k.read(ctx)
		out.Rounds++
		out.Pods += pods
		for _, err := range errs {
			out.Errors[err.Error()]++
		}
	}

	out.Events = int(events.Load())

	return json.NewEncoder(os.Stdout).Encode(out)
}

// watch passes each event to the kubelet's code and counts them. It returns after the runtime has
// accepted the watch.
func watch(ctx context.Context, k *kubelet, runtime internalapi.RuntimeService) (*atomic.Int64, error) {
	var count atomic.Int64
	events := make(chan *runtimeapi.ContainerEventResponse)
	failed, connected := make(chan error, 1), make(chan struct{})

	go func() {
		failed <- runtime.GetContainerEvents(ctx, events, func(runtimeapi.RuntimeService_GetContainerEventsClient) {
			close(connected)
		})
	}()

	go func() {
		for event := range events {
			k.event(event)
			count.Add(1)
		}
	}()

	select {
	case <-connected:
		return &count, nil
	case err := <-failed:
		return nil, fmt.Errorf("events: %w", err)
	case <-time.After(dialTimeout):
		return nil, fmt.Errorf("events: not connected after %v", dialTimeout)
	}
}
