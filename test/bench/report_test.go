package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	d := []time.Duration{4, 1, 3, 2, 5}
	for q, want := range map[int]time.Duration{1: 1, 50: 3, 99: 5, 100: 5} {
		t.Run(fmt.Sprint(q), func(t *testing.T) {
			if got := quantile(d, q); got != want {
				t.Errorf("quantile %d is %d, want %d", q, got, want)
			}
		})
	}

	if quantile(nil, 50) != 0 {
		t.Error("quantile of no samples is not 0")
	}
}

// TestReport expects each limit to fail independently.
func TestReport(t *testing.T) {
	fine := func() results {
		return results{Samples: map[operation][]time.Duration{
			listSandboxes:              {listLimit},
			listContainers:             {listLimit},
			sandboxStatus:              {statusLimit},
			containerStatus:            {statusLimit},
			engineList:                 {time.Second},
			runSandbox:                 {115 * time.Millisecond},
			floorHost:                  {100 * time.Millisecond},
			stopSandbox:                {35 * time.Millisecond},
			floorDown:                  {20 * time.Millisecond},
			inEngineMode(runSandbox):   {105 * time.Millisecond},
			inEngineMode(floorSandbox): {100 * time.Millisecond},
			inEngineMode(stopSandbox):  {35 * time.Millisecond},
			inEngineMode(floorDown):    {20 * time.Millisecond},
		}}
	}

	var out strings.Builder
	if !report(&out, fine(), rssLimit) || strings.Contains(out.String(), "FAIL") {
		t.Errorf("report of results at their limits:\n%s", &out)
	}

	for _, op := range []operation{listSandboxes, listContainers, sandboxStatus, containerStatus, runSandbox,
		stopSandbox, inEngineMode(runSandbox), inEngineMode(stopSandbox)} {
		t.Run(string(op), func(t *testing.T) {
			f := fine()
			f.Samples[op][0]++
			var out strings.Builder
			if report(&out, f, rssLimit) || strings.Count(out.String(), "FAIL") != 1 {
				t.Errorf("report of a value beyond its limit:\n%s", &out)
			}
		})
	}

	out.Reset()
	if report(&out, fine(), rssLimit+1) {
		t.Errorf("report of memory beyond its limit:\n%s", &out)
	}
}
