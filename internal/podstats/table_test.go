package podstats

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
)

func TestWholePages(t *testing.T) {
	page := int64(os.Getpagesize())
	for limit, want := range map[int64]int64{-1: 0, 0: 0, page - 1: 0, page: page, 10*page + 1: 10 * page} {
		if got := wholePages(limit); got != want {
			t.Errorf("a limit of %d is %d, not %d", limit, got, want)
		}
	}
}

// TestNoDiskYet: a container without disk usage reports zero, a pod reports nothing.
func TestNoDiskYet(t *testing.T) {
	of := func(m *measured) (got []string) {
		m.device = func(uint32, uint32) string { return "/dev/sda" }
		m.report(func(i int, value uint64, labels []string) {
			if x := metrics[i]; x.name == "container_fs_reads_total" || x.name == "container_blkio_device_usage_total" {
				got = append(got, fmt.Sprintf("%s %d %q", x.name, value, labels))
			}
		})
		return got
	}

	used := &stats.Details{Details: cgroup.Details{Devices: []cgroup.Device{{Major: 8, ReadBytes: 5, Reads: 1}}}}
	tests := []struct {
		name string
		m    *measured
		want []string
	}{
		{"container", &measured{container: &model.Container{}, details: &stats.Details{}}, []string{
			`container_fs_reads_total 0 [""]`,
			`container_blkio_device_usage_total 0 ["" "" "" "Read"]`,
			`container_blkio_device_usage_total 0 ["" "" "" "Write"]`,
		}},
		{"pod", &measured{details: &stats.Details{}}, nil},
		{"used disk", &measured{details: used}, []string{
			`container_fs_reads_total 1 ["/dev/sda"]`,
			`container_blkio_device_usage_total 5 ["/dev/sda" "8" "0" "Read"]`,
			`container_blkio_device_usage_total 0 ["/dev/sda" "8" "0" "Write"]`,
		}},
		{"network", &measured{network: []stats.Interface{{Name: "eth0"}}}, nil},
	}

	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, of(c.m)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestUnknownDisksAreOneValue: two disks without a name have equal labels, and duplicates would
// invalidate the list.
func TestUnknownDisksAreOneValue(t *testing.T) {
	d := &stats.Details{Details: cgroup.Details{Devices: []cgroup.Device{
		{Major: 8, Reads: 1},
		{Major: 254, Minor: 7, Reads: 2},
		{Major: 254, Minor: 8, Reads: 3},
	}}}

	m := &measured{details: d, device: func(major, _ uint32) string { return map[uint32]string{8: "/dev/sda"}[major] }}
	got := map[string]uint64{}
	seen := map[string]bool{}
	m.report(func(i int, value uint64, labels []string) {
		key := fmt.Sprint(metrics[i].name, labels)
		if seen[key] {
			t.Errorf("%s is duplicate", key)
		}

		seen[key] = true
		if metrics[i].name == "container_fs_reads_total" {
			got[labels[0]] = value
		}
	})

	if len(got) != 2 || got["/dev/sda"] != 1 || got[""] != 5 {
		t.Errorf("values: %v", got)
	}
}

// TestMaxInterfaces bounds the interfaces in a response for any number of pods.
func TestMaxInterfaces(t *testing.T) {
	for pods, want := range map[int]int{0: 32, 1: 32, 32: 32, 110: 9, 256: 4, 1000: 4} {
		if got := maxInterfaces(pods); got != want {
			t.Errorf("%d pods: %d interfaces each, want %d", pods, got, want)
		}
	}
}

// TestEncodedMetrics: a client receives exactly the values of the table.
func TestEncodedMetrics(t *testing.T) {
	at := time.Unix(5, 7)
	m := &measured{
		labels:    []string{"main", "/kubepods/pod/id", "image", "k8s_main", "default", "p\xffd"},
		now:       time.Unix(9, 0),
		start:     time.Unix(1, 0),
		details:   &stats.Details{Details: cgroup.Details{Usage: cgroup.Usage{CPU: 1 << 33 * uint64(time.Second)}}},
		container: &model.Container{},
		network:   []stats.Interface{{Name: "\xfe", RxBytes: 1<<64 - 1}},
		layer:     &layer{bytes: 300, at: at, fs: stats.FileSystem{Device: "/dev/sda"}},
		device:    func(uint32, uint32) string { return "" },
	}

	got := &runtimeapi.ContainerMetrics{}
	if err := proto.Unmarshal((&encoder{}).appendMetrics(nil, m), got); err != nil {
		t.Fatal(err)
	}

	var want []*runtimeapi.Metric
	m.report(func(i int, v uint64, labels []string) {
		shared := []string{"main", "/kubepods/pod/id", "image", "k8s_main", "default", "p\uFFFDd"}
		x := &runtimeapi.Metric{Name: metrics[i].name, LabelValues: append(shared, labels...), Value: value(v)}
		if len(labels) > 0 && labels[0] == "\xfe" {
			x.LabelValues[SharedLabels] = "\uFFFD"
		}
		if metrics[i].isGauge {
			x.MetricType = runtimeapi.MetricType_GAUGE
		}
		if metrics[i].isNanos {
			x.Value.Value = v / uint64(time.Second)
		}
		if metrics[i].isOfLayer {
			x.Timestamp = at.UnixNano()
		}

		want = append(want, x)
	})

	if diff := cmp.Diff(want, got.Metrics, protocmp.Transform()); diff != "" || len(want) < 20 {
		t.Errorf("%d metrics (-want +got): %s", len(want), diff)
	}
}
