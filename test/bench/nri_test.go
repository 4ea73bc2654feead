package main

import (
	"testing"
	"time"
)

// TestBootstrap expects an interval around the median that is narrow for equal samples.
func TestBootstrap(t *testing.T) {
	equal := []time.Duration{5, 5, 5, 5}
	if low, high := bootstrap(equal); low != 5 || high != 5 {
		t.Errorf("interval of equal samples: %d to %d", low, high)
	}

	var spread []time.Duration
	for i := range 101 {
		spread = append(spread, time.Duration(i))
	}
	low, high := bootstrap(spread)
	if low > 50 || high < 50 || low < 20 || high > 80 {
		t.Errorf("interval %d to %d, want one around 50", low, high)
	}
}

// TestBootstrapOfSeries expects the same interval for a second series with the same values.
func TestBootstrapOfSeries(t *testing.T) {
	var one []time.Duration
	for i := range 51 {
		one = append(one, time.Duration(i*i))
	}
	low, high := bootstrap(one)
	if low2, high2 := bootstrap(one, one); low2 != low || high2 != high {
		t.Errorf("interval %d to %d of two series, %d to %d of one", low2, high2, low, high)
	}
}

// TestNRILimit compares rounds with a growing load: only the differences within a round count.
func TestNRILimit(t *testing.T) {
	for extra, want := range map[time.Duration]bool{0: true, 9 * time.Millisecond: true, 50 * time.Millisecond: false} {
		times := map[string]callTimes{nriOff: {}, nriFloor: {}, nriOn: {}}
		for i := range 50 {
			base := time.Second + time.Duration(i)*10*time.Millisecond
			for _, op := range []operation{"RunPodSandbox", "CreateContainer", "StartContainer", threeCalls} {
				times[nriOff][op] = append(times[nriOff][op], base)
				times[nriFloor][op] = append(times[nriFloor][op], base)
				times[nriOn][op] = append(times[nriOn][op], base+extra)
			}
		}
		if got := reportNRI(times); got != want {
			t.Errorf("%s more: within the limit %v, want %v", extra, got, want)
		}
	}
}
