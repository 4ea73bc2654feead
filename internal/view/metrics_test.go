package view

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
)

func TestViewMetrics(t *testing.T) {
	f := enginetest.NewFake("app:1")
	running := makePod(t, f, "running")
	makePod(t, f, "made")
	if err := f.Start(t.Context(), model.ContainerID(running)); err != nil {
		t.Fatal(err)
	}

	v := run(t, f)
	<-v.Synced()
	if err := v.Resync(t.Context()); err != nil {
		t.Fatal(err)
	}

	r := prometheus.NewRegistry()
	r.MustRegister(v.Collectors()...)
	want := `
# HELP cri_dockerd_containers Containers of pods, by state (created, running, exited, unknown).
# TYPE cri_dockerd_containers gauge
cri_dockerd_containers{state="created"} 0
cri_dockerd_containers{state="exited"} 0
cri_dockerd_containers{state="running"} 0
cri_dockerd_containers{state="unknown"} 0
# HELP cri_dockerd_images Images of the engine.
# TYPE cri_dockerd_images gauge
cri_dockerd_images 1
# HELP cri_dockerd_resyncs_total Full reads of the engine's objects, by reason (connect, periodic, reload, missed).
# TYPE cri_dockerd_resyncs_total counter
cri_dockerd_resyncs_total{reason="connect"} 1
cri_dockerd_resyncs_total{reason="missed"} 0
cri_dockerd_resyncs_total{reason="periodic"} 0
cri_dockerd_resyncs_total{reason="reload"} 1
# HELP cri_dockerd_sandboxes Sandboxes, by state (ready, notready).
# TYPE cri_dockerd_sandboxes gauge
cri_dockerd_sandboxes{state="notready"} 1
cri_dockerd_sandboxes{state="ready"} 1
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "cri_dockerd_containers", "cri_dockerd_images",
		"cri_dockerd_resyncs_total", "cri_dockerd_sandboxes"); err != nil {
		t.Error(err)
	}
}

// TestLagIsOfTheFirstEvent: the lag is measured from the first event without a later read. An event
// without a read has no lag, and neither has a read without an event.
func TestLagIsOfTheFirstEvent(t *testing.T) {
	m := newViewMetrics()
	observed := func() (n uint64, sum float64) {
		r := prometheus.NewRegistry()
		r.MustRegister(m.lag)
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}

		h := families[0].GetMetric()[0].GetHistogram()

		return h.GetSampleCount(), h.GetSampleSum()
	}

	m.beginRead("a")()
	m.countEvent(engine.Event{ID: "a", At: time.Now().Add(-time.Hour)})
	m.countEvent(engine.Event{ID: "a", At: time.Now()})
	m.countEvent(engine.Event{ID: "b", At: time.Now()})
	if n, _ := observed(); n != 0 {
		t.Errorf("%d observations before any read", n)
	}

	seen := m.beginRead("a")
	// During the read, with a clock difference.
	m.countEvent(engine.Event{ID: "a", At: time.Now().Add(time.Hour)})
	seen()
	if n, sum := observed(); n != 1 || sum < 3600 {
		t.Errorf("%d observations, %v s", n, sum)
	}

	m.beginRead("a")()
	if n, sum := observed(); n != 2 || sum < 3600 || sum > 3700 {
		t.Errorf("%d observations, %v s", n, sum)
	}

	m.countResync(resyncConnect) // this read covers the event of "b"
	m.beginRead("b")()
	if n, _ := observed(); n != 2 {
		t.Errorf("%d observations after a new connection", n)
	}
}

func TestStuck(t *testing.T) {
	v := New(enginetest.NewFake(), discard)
	if err := v.CheckProgress(); err != nil {
		t.Error(err)
	}

	v.reading.Store(time.Now().Add(-3 * readDeadline).UnixNano())
	if err := v.CheckProgress(); err == nil {
		t.Error("an endless read is not detected")
	}
}
