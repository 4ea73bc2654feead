// Command kubeletread reads a CRI runtime with the kubelet's own code: pods and their states,
// images, stats from the CRI alone and beside cAdvisor, metrics, events. Where an answer would
// crash a kubelet, it crashes.
//
//	kubeletread ENDPOINT         reads again and again until its standard input ends, then prints
//	                             how often, and which errors the kubelet's code returned
//	kubeletread -dereferences    prints which messages of full answers the kubelet's code uses
//	                             without a check: it panics when one is missing
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

// dialTimeout bounds each connection to the runtime.
const dialTimeout = 10 * time.Second

// pause is between two rounds, so that the runtime has time for others.
const pause = 10 * time.Millisecond

func main() {
	dereferences := flag.Bool("dereferences", false, "print the messages that are used without a check")
	flag.Parse()
	klog.SetLogger(klog.New(nil)) // what the kubelet logs of errors is in the result

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

// result is what reading until the end of standard input has come to.
type result struct {
	Rounds int            // in which everything was read once
	Pods   int            // read in all rounds
	Events int            // received
	Errors map[string]int // that the kubelet's code returned, and how often
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
	for ; !ended.Load(); time.Sleep(pause) {
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

// watch has the kubelet's code take each event, and counts them. It returns when the runtime has
// accepted the watch.
func watch(ctx context.Context, k *kubelet, runtime internalapi.RuntimeService) (*atomic.Int64, error) {
	var count atomic.Int64
	events, failed, connected := make(chan *runtimeapi.ContainerEventResponse), make(chan error, 1), make(chan struct{})
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
