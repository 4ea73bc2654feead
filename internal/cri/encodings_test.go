package cri

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
	"cri-dockerd/test/answers"
)

// received is an answer as its client gets it. One that would crash a kubelet is an error.
func received[M proto.Message](m M, err error) (M, error) {
	if err != nil {
		return m, err
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return m, err
	}
	out := m.ProtoReflect().New().Interface().(M)
	if err := proto.Unmarshal(b, out); err != nil {
		return out, err
	}
	return out, answers.Check(out)
}

// TestEncodings: a record is what its message is to a client, is encoded once, and is forgotten some time after it is gone.
func TestEncodings(t *testing.T) {
	made := 0
	e := newEncodings(
		func(c *spec.Container) proto.Message { made++; return c.Item() },
		func(c *spec.Container) proto.Message { return c.Attributes() }, shortContainer)
	records := func(n int) (out []*spec.Container) {
		for i := range n {
			out = append(out, &spec.Container{
				ID: model.ContainerID(fmt.Sprint("id-", i)), SandboxID: "pod", Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: uint32(i)}, Labels: map[string]string{"odd": fmt.Sprint(i%2 == 1)},
				State: runtimeapi.ContainerState_CONTAINER_EXITED, CreatedAt: time.Unix(int64(i), 5),
			})
		}
		return out
	}
	all, want := records(100), &runtimeapi.ListContainersResponse{}
	odd := func(c *spec.Container) bool { return c.Labels["odd"] == "true" }
	for _, c := range all {
		if odd(c) {
			want.Containers = append(want.Containers, c.Item())
		}
	}
	for range 2 {
		items, err := e.items(all, odd, maxList)
		if err != nil {
			t.Fatal(err)
		}
		got, err := received(wire.Carry(&runtimeapi.ListContainersResponse{}, items), nil)
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" || err != nil {
			t.Errorf("received (-want +got): %s, %v", diff, err)
		}
	}
	if made != 50 {
		t.Errorf("50 records were encoded %d times", made)
	}
	for range 20 {
		if _, err := e.items(records(10), func(*spec.Container) bool { return true }, maxList); err != nil {
			t.Fatal(err)
		}
	}
	if len(e.known) > 2*10+gone {
		t.Errorf("%d records are kept of 10", len(e.known))
	}
	items, err := e.items([]*spec.Container{{ID: "\xff", Metadata: &runtimeapi.ContainerMetadata{Name: "main"}}}, func(*spec.Container) bool { return true }, maxList)
	got, err := received(wire.Carry(&runtimeapi.ListContainersResponse{}, items), err)
	if err != nil || len(got.Containers) != 1 || got.Containers[0].Id != "\uFFFD" {
		t.Errorf("a record that is no UTF-8: %v, %v", got, err)
	}
}

// TestEncodedMetrics: a client gets what the table says, whatever the values are.
func TestEncodedMetrics(t *testing.T) {
	at := time.Unix(5, 7)
	m := &measured{
		labels: []string{"main", "/kubepods/pod/id", "image", "k8s_main", "default", "p\xffd"}, now: time.Unix(9, 0), start: time.Unix(1, 0),
		details: &stats.Details{Details: cgroup.Details{Usage: cgroup.Usage{CPU: 1 << 33 * uint64(time.Second)}}}, container: &spec.Container{},
		network: []stats.Interface{{Name: "\xfe", RxBytes: 1<<64 - 1}}, layer: &layer{bytes: 300, at: at, fs: stats.FileSystem{Device: "/dev/sda"}},
		device: func(uint32, uint32) string { return "" },
	}
	got := &runtimeapi.ContainerMetrics{}
	if err := proto.Unmarshal((&encoder{}).metrics(nil, m), got); err != nil {
		t.Fatal(err)
	}
	var want []*runtimeapi.Metric
	m.samples(func(i int, v uint64, labels []string) {
		x := &runtimeapi.Metric{Name: metrics[i].name, LabelValues: append([]string{"main", "/kubepods/pod/id", "image", "k8s_main", "default", "p\uFFFDd"}, labels...), Value: value(v)}
		if len(labels) > 0 && labels[0] == "\xfe" {
			x.LabelValues[SharedLabels] = "\uFFFD"
		}
		if metrics[i].gauge {
			x.MetricType = runtimeapi.MetricType_GAUGE
		}
		if metrics[i].nanos {
			x.Value.Value = v / uint64(time.Second)
		}
		if metrics[i].measuredBefore {
			x.Timestamp = at.UnixNano()
		}
		want = append(want, x)
	})
	if diff := cmp.Diff(want, got.Metrics, protocmp.Transform()); diff != "" || len(want) < 20 {
		t.Errorf("%d metrics (-want +got): %s", len(want), diff)
	}
}
