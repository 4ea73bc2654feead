package rpc

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/wire"
)

// carrier returns lists of encoded items. The filter's ID sets their length.
type carrier struct{ service }

func (c *carrier) items(id string) []byte {
	b := wire.NewBuffer(len(id) + 20)
	for range 3 {
		var err error
		if b, err = wire.AppendItem(b, &runtimeapi.PodSandbox{Id: id}); err != nil {
			panic(err)
		}
	}

	return b
}

func (c *carrier) ListPodSandbox(
	_ context.Context, r *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	return wire.WithEncoded(&runtimeapi.ListPodSandboxResponse{}, c.items(r.Filter.Id)), nil
}

func (c *carrier) StreamPodSandboxes(
	r *runtimeapi.StreamPodSandboxesRequest, out runtimeapi.RuntimeService_StreamPodSandboxesServer,
) error {
	items := c.items(r.Filter.Id)
	return wire.SendPages(items, len(items)/2, func(page []byte) error {
		return out.Send(wire.WithEncoded(&runtimeapi.StreamPodSandboxesResponse{}, page))
	})
}

// TestEncodedResponses checks that concurrent responses in reused memory arrive unchanged, together
// with ordinary responses.
func TestEncodedResponses(t *testing.T) {
	c := &carrier{}
	conn, _ := serve(t, Services{Runtime: c, Image: c, Validate: func(any) error { return nil }, Log: quiet()})
	runtime, image := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	var clients sync.WaitGroup
	for client := range 8 {
		clients.Go(func() {
			for i := range 50 {
				id := strings.Repeat(fmt.Sprintf("%d,%d ", client, i), 1+i*i*8)
				l, err := runtime.ListPodSandbox(t.Context(),
					&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: id}})
				if err != nil || len(l.Items) != 3 || l.Items[0].Id != id || l.Items[2].Id != id {
					t.Errorf("list %d of client %d: %.100v, %v", i, client, l, err)
				}

				s, err := runtime.StreamPodSandboxes(t.Context(),
					&runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: id}})
				if err != nil {
					t.Error(err)
					return
				}

				for range 3 {
					if page, err := s.Recv(); err != nil || len(page.PodSandboxes) != 1 ||
						page.PodSandboxes[0].Id != id {
						t.Errorf("page %d of client %d: %.100v, %v", i, client, page, err)
					}
				}

				if p, err := image.PullImage(t.Context(), &runtimeapi.PullImageRequest{}); err != nil ||
					p.ImageRef != "sha256:1" {
					t.Errorf("ordinary response: %v, %v", p, err)
				}

				_, _ = s.Recv()
			}
		})
	}

	clients.Wait()
}
