package wire

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// receive decodes a response with items of these names like a client.
func receive(t *testing.T, items []byte) (names []string) {
	t.Helper()
	answer := WithEncoded(&runtimeapi.ListPodSandboxResponse{}, items)
	b, err := proto.Marshal(answer)
	if err != nil {
		t.Fatal(err)
	}

	got := &runtimeapi.ListPodSandboxResponse{}
	if err := proto.Unmarshal(b, got); err != nil {
		t.Fatal(err)
	}

	for _, p := range got.Items {
		names = append(names, p.Id)
	}

	return names
}

func items(t *testing.T, names ...string) (b []byte) {
	t.Helper()
	for _, n := range names {
		var err error
		if b, err = AppendItem(b, &runtimeapi.PodSandbox{Id: n}); err != nil {
			t.Fatal(err)
		}
	}

	return b
}

func TestWithEncoded(t *testing.T) {
	b := items(t, "a", "", "c")
	if got := receive(t, b); !slices.Equal(got, []string{"a", "", "c"}) {
		t.Errorf("received %q", got)
	}

	tests := []struct {
		name     string
		response *runtimeapi.ListPodSandboxResponse
		ok       bool
	}{
		{"items", WithEncoded(&runtimeapi.ListPodSandboxResponse{}, b), true},
		{"mixed", WithEncoded(&runtimeapi.ListPodSandboxResponse{
			Items: []*runtimeapi.PodSandbox{{Id: "mixed"}},
		}, b), false},
		{"empty", WithEncoded(&runtimeapi.ListPodSandboxResponse{}, nil), false},
		{"usual", &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{{Id: "usual"}}}, false},
		{"nil", nil, false},
	}

	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := Encoded(c.response); ok != c.ok || ok && !bytes.Equal(got, b) {
				t.Errorf("%v has encoded fields %q, %v", c.response, got, ok)
			}
		})
	}
}

// TestInvalidTexts: an item with invalid UTF-8 in any string is sent with valid strings, and the
// record stays unchanged.
func TestInvalidTexts(t *testing.T) {
	item := &runtimeapi.ContainerStatus{
		Id:       "\xff",
		Metadata: &runtimeapi.ContainerMetadata{Name: "a\xc3"},
		Labels:   map[string]string{"k\xfe": "v\xfd", "k": "\xff", "good": "good"},
		Mounts:   []*runtimeapi.Mount{{HostPath: "/\xff"}, {HostPath: "/good"}},
		User:     &runtimeapi.ContainerUser{},
		Resources: &runtimeapi.ContainerResources{
			Linux: &runtimeapi.LinuxContainerResources{Unified: map[string]string{"\xff": ""}},
		},
	}

	b, err := AppendItem([]byte(nil), item)
	if err != nil {
		t.Fatal(err)
	}

	fields, _, _ := protowire.ConsumeTag(b)
	_, _, begin := protowire.ConsumeTag(b)
	message, n := protowire.ConsumeBytes(b[begin:])
	if fields != Items || n < 0 {
		t.Fatalf("field %d, %d bytes", fields, n)
	}

	got := &runtimeapi.ContainerStatus{}
	if err := proto.Unmarshal(message, got); err != nil {
		t.Fatal(err)
	}

	const bad = "\uFFFD"
	if got.Id != bad || got.Metadata.Name != "a"+bad || got.Labels["k"+bad] != "v"+bad || got.Labels["k"] != bad ||
		got.Labels["good"] != "good" ||
		got.Mounts[0].HostPath != "/"+bad || got.Mounts[1].HostPath != "/good" ||
		len(got.Resources.Linux.Unified) != 1 || len(got.Labels) != 3 {
		t.Errorf("received: %v", got)
	}

	if item.Id != "\xff" || item.Labels["k\xfe"] != "v\xfd" {
		t.Error("the record was modified")
	}
}

// TestFields: the appended bytes equal protobuf's encoding of the message.
func TestFields(t *testing.T) {
	tests := []*runtimeapi.Metric{
		{Value: &runtimeapi.UInt64Value{}},
		{
			Name:        "n",
			Timestamp:   1<<62 + 1,
			MetricType:  runtimeapi.MetricType_GAUGE,
			LabelValues: []string{"", "ä"},
			Value:       &runtimeapi.UInt64Value{Value: 1<<64 - 1},
		},
		{
			Name:        strings.Repeat("n", 300),
			LabelValues: []string{strings.Repeat("l", 20000)},
			Value:       &runtimeapi.UInt64Value{Value: 127},
		},
		{Name: "-1", Timestamp: -1, Value: &runtimeapi.UInt64Value{Value: 128}},
	}

	for _, m := range tests {
		t.Run(fmt.Sprintf("%.20s", m.Name), func(t *testing.T) {
			var b []byte
			if m.Name != "" {
				b = AppendText(b, 1, m.Name)
			}

			b = AppendNumber(AppendNumber(b, 2, uint64(m.Timestamp)), 3, uint64(m.MetricType))
			for _, l := range m.LabelValues {
				b = AppendText(b, 4, l)
			}

			b = AppendWrapped(b, 5, m.Value.Value)
			want, err := proto.Marshal(m)
			if err != nil || !bytes.Equal(b, want) {
				t.Errorf("%.100v: %.100x, want %.100x, %v", m, b, want, err)
			}

			all, err := proto.Marshal(&runtimeapi.ContainerMetrics{Metrics: []*runtimeapi.Metric{m}})
			if got := AppendField(nil, 2, b); err != nil || !bytes.Equal(got, all) {
				t.Errorf("as a field: %.100x, want %.100x, %v", got, all, err)
			}
		})
	}

	if got := receive(t, AppendField(nil, Items, AppendText(nil, 1, "eth\xff0"))); !slices.Equal(got,
		[]string{"eth\uFFFD0"}) {
		t.Errorf("invalid UTF-8: %q", got)
	}
}

// TestSendPages sends every item once, in order, in responses of bounded size with their own
// memory. A larger item is sent alone.
func TestSendPages(t *testing.T) {
	const limit = 1000
	small, half, large := "s", strings.Repeat("h", limit/2-50), strings.Repeat("l", 2*limit)
	names := []string{small, half, half, half, large, small, small}
	all := items(t, names...)
	var counts []int
	var got []string
	if err := SendPages(slices.Clone(all), limit, func(page []byte) error {
		one := receive(t, page)
		counts, got = append(counts, len(one)), append(got, one...)
		clear(page)
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	if !slices.Equal(got, names) || !slices.Equal(counts, []int{3, 1, 1, 2}) || !bytes.Equal(all, items(t, names...)) {
		t.Errorf("%d items in pages of %v", len(got), counts)
	}
	if err := SendPages(nil, limit, func([]byte) error { return errors.New("an empty page was sent") }); err != nil {
		t.Error(err)
	}

	boom := errors.New("the client has disconnected")
	if err := SendPages(slices.Clone(all), limit, func([]byte) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("an error of the stream: %v", err)
	}

	if err := SendPages(slices.Clone(all[:len(all)-1]), limit, func([]byte) error { return nil }); err == nil {
		t.Error("a partial item was sent")
	}
}

// TestNewBuffer: released memory is empty when reused, and never too small.
func TestNewBuffer(t *testing.T) {
	for i := range 3 * minReused {
		b := NewBuffer(i)
		if len(b) != 0 || cap(b) < i || cap(b) > max(2*i, minReused) {
			t.Fatalf("room for %d bytes: %d of %d", i, len(b), cap(b))
		}
		Release(append(b, "used"...))
		Release(make([]byte, i, i+i%7))
	}
}
