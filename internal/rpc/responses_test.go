package rpc

import (
	"context"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/wire"
)

// largeService returns large responses and counts its calls.
type largeService struct {
	service
	lists, statuses atomic.Int32
	fail            atomic.Bool
}

var largeID = strings.Repeat("x", 200<<10)

func (l *largeService) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	l.lists.Add(1)
	if l.fail.Load() {
		panic("failed list")
	}
	b, err := wire.AppendItem(nil, &runtimeapi.Container{Id: largeID})
	return wire.WithEncoded(&runtimeapi.ListContainersResponse{}, b), err
}

func (l *largeService) ListImages(
	context.Context, *runtimeapi.ListImagesRequest,
) (*runtimeapi.ListImagesResponse, error) {
	l.lists.Add(1)
	return &runtimeapi.ListImagesResponse{Images: []*runtimeapi.Image{{Id: largeID}}}, nil
}

func (l *largeService) ListPodSandbox(
	context.Context, *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{}, nil
}

func (l *largeService) ContainerStatus(
	context.Context, *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	l.statuses.Add(1)
	return &runtimeapi.ContainerStatusResponse{Info: map[string]string{"info": largeID}}, nil
}

// stalledConn stops reading when stalled is set, until resume is closed.
type stalledConn struct {
	net.Conn
	stalled *atomic.Bool
	resume  chan struct{}
}

func (c stalledConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.stalled.Load() {
		<-c.resume
	}
	return n, err
}

// TestStalledClient sends calls with large responses on a connection without a reader. The service
// may run only a few of them, and all calls return when the client reads again.
func TestStalledClient(t *testing.T) {
	l := &largeService{}
	srv := New(Services{Runtime: l, Image: l, Validate: func(any) error { return nil }, Log: quiet()})
	listener := bufconn.Listen(1 << 20)
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(listener) })
	defer serving.Wait()
	defer srv.Stop(time.Second)

	var stalled atomic.Bool
	resume := make(chan struct{})
	conn := dial(t, func(ctx context.Context) (net.Conn, error) {
		nc, err := listener.DialContext(ctx)
		return stalledConn{nc, &stalled, resume}, err
	})

	other := dial(t, listener.DialContext)
	r, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	if _, err := r.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Fatal(err)
	}

	stalled.Store(true)
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			resp, err := r.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
			if err != nil || len(resp.Containers) != 1 || resp.Containers[0].Id != largeID {
				t.Errorf("ListContainers: %v", err)
			}
		})

		calls.Go(func() {
			resp, err := images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
			if err != nil || len(resp.Images) != 1 || resp.Images[0].Id != largeID {
				t.Errorf("ListImages: %v", err)
			}
		})
	}

	eventually(t, func() bool { return l.lists.Load() >= responseSlots })
	time.Sleep(100 * time.Millisecond) // further calls would start within this time
	if n := l.lists.Load(); n > responseSlots+1 {
		t.Errorf("%d large responses for a stalled client, want at most %d", n, responseSlots+1)
	}

	if _, err := runtimeapi.NewRuntimeServiceClient(other).ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{}); err != nil {
		t.Errorf("other client: %v", err)
	}

	stalled.Store(false)
	close(resume)
	calls.Wait()
}

// dial returns a client with connections from dialer.
func dial(t *testing.T, dialer func(context.Context) (net.Conn, error)) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialer(ctx) }))
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { c.Close() })

	return c
}

// TestLargeResponsesWaitForSlot checks that large responses of other calls fail if all slots remain
// in use.
func TestLargeResponsesWaitForSlot(t *testing.T) {
	slots := make(chan struct{}, responseSlots)
	ctx := context.WithValue(t.Context(), connectionKey{}, slots)
	large := &runtimeapi.ContainerStatusResponse{Info: map[string]string{"info": largeID}}
	for range responseSlots {
		if _, err := holdResponse(ctx, "ContainerStatus", large, nil); err != nil {
			t.Fatal(err)
		}
	}

	if _, err := holdResponse(ctx, "ContainerStatus", &runtimeapi.ContainerStatusResponse{}, nil); err != nil {
		t.Errorf("small response: %v", err)
	}

	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()

	if _, err := holdResponse(short, "ContainerStatus", large, nil); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("no slot: %v, want ResourceExhausted", err)
	}
}

// TestSlotsAreReleased sends more calls of every kind than there are slots, including failing ones.
func TestSlotsAreReleased(t *testing.T) {
	l := &largeService{}
	conn, _ := serve(t, Services{Runtime: l, Image: l, Validate: func(any) error { return nil }, Log: quiet()})
	r, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	for range 2 * responseSlots {
		l.fail.Store(true)
		if _, err := r.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); status.Code(err) != codes.Internal {
			t.Fatalf("failing list: %v", err)
		}

		l.fail.Store(false)
		_, err := r.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		_, err2 := images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
		_, err3 := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		_, err4 := r.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{})
		for _, err := range []error{err, err2, err3, err4} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// eventually waits until a condition is met.
func eventually(t *testing.T, isMet func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !isMet(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("timeout")
		}
	}
}
