package cri

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/wire"
	"cri-dockerd/test/answers"
)

// received returns a response as decoded by the client, or an error if it would crash a kubelet.
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

// TestEncodings: clients decode cached records like any other message, and each record is encoded
// once.
func TestEncodings(t *testing.T) {
	made := 0
	e := newEncodings(
		func(c *model.Container) proto.Message { made++; return c.Item() },
		func(c *model.Container) proto.Message { return c.ShortItem() })
	records := func(n int) (out []*model.Container) {
		for i := range n {
			out = append(out, &model.Container{
				ID:        model.ContainerID(fmt.Sprint("id-", i)),
				SandboxID: "pod",
				Metadata:  &runtimeapi.ContainerMetadata{Name: "main", Attempt: uint32(i)},
				Labels:    map[string]string{"odd": fmt.Sprint(i%2 == 1)},
				State:     runtimeapi.ContainerState_CONTAINER_EXITED,
				CreatedAt: time.Unix(int64(i), 5),
			})
		}

		return out
	}

	all, want := records(100), &runtimeapi.ListContainersResponse{}
	odd := func(c *model.Container) bool { return c.Labels["odd"] == "true" }
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

		got, err := received(wire.WithEncoded(&runtimeapi.ListContainersResponse{}, items), nil)
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" || err != nil {
			t.Errorf("received (-want +got): %s, %v", diff, err)
		}
	}

	if made != 50 {
		t.Errorf("encoded 50 records %d times", made)
	}

	items, err := e.items([]*model.Container{{ID: "\xff", Metadata: &runtimeapi.ContainerMetadata{Name: "main"}}},
		func(*model.Container) bool { return true }, maxList)
	got, err := received(wire.WithEncoded(&runtimeapi.ListContainersResponse{}, items), err)
	if err != nil || len(got.Containers) != 1 || got.Containers[0].Id != "\uFFFD" {
		t.Errorf("a record with invalid UTF-8: %v, %v", got, err)
	}
}
