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

// largeService gives large answers and counts its calls.
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
		panic("a list fails")
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

// deafConn delivers nothing between deaf and heard.
type deafConn struct {
	net.Conn
	deaf  *atomic.Bool
	heard chan struct{}
}

func (c deafConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.deaf.Load() {
		<-c.heard
	}
	return n, err
}

// TestDeafClient makes calls with large answers on a connection that nobody reads. Only a few
// answers may be made, and all calls end when the client reads again.
func TestDeafClient(t *testing.T) {
	l := &largeService{}
	srv := New(Services{Runtime: l, Image: l, Validate: func(any) error { return nil }, Log: quiet()})
	listener := bufconn.Listen(1 << 20)
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(listener) })
	defer serving.Wait()
	defer srv.Stop(time.Second)

	var deaf atomic.Bool
	heard := make(chan struct{})
	conn := dial(t, func(ctx context.Context) (net.Conn, error) {
		nc, err := listener.DialContext(ctx)
		return deafConn{nc, &deaf, heard}, err
	})

	other := dial(t, listener.DialContext)
	r, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	if _, err := r.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Fatal(err)
	}

	deaf.Store(true)
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			a, err := r.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
			if err != nil || len(a.Containers) != 1 || a.Containers[0].Id != largeID {
				t.Errorf("ListContainers: %v", err)
			}
		})

		calls.Go(func() {
			a, err := images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
			if err != nil || len(a.Images) != 1 || a.Images[0].Id != largeID {
				t.Errorf("ListImages: %v", err)
			}
		})
	}

	eventually(t, func() bool { return l.lists.Load() >= largeAnswers })
	time.Sleep(100 * time.Millisecond) // more calls would begin within this time
	if n := l.lists.Load(); n > largeAnswers+1 {
		t.Errorf("%d large answers were made for a client that does not read, want at most %d", n, largeAnswers+1)
	}

	if _, err := runtimeapi.NewRuntimeServiceClient(other).ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{}); err != nil {
		t.Errorf("another client: %v", err)
	}

	deaf.Store(false)
	close(heard)
	calls.Wait()
}

// dial returns a client of connections that dialer makes.
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

// TestLargeAnswersWaitForASlot: other calls with large answers fail if the client does not read,
// and get a slot if it does.
func TestLargeAnswersWaitForASlot(t *testing.T) {
	slots := make(chan struct{}, largeAnswers)
	ctx := context.WithValue(t.Context(), connectionKey{}, slots)
	large := &runtimeapi.ContainerStatusResponse{Info: map[string]string{"info": largeID}}
	for range largeAnswers {
		if _, err := holdAnswer(ctx, "ContainerStatus", large, nil); err != nil {
			t.Fatal(err)
		}
	}

	if _, err := holdAnswer(ctx, "ContainerStatus", &runtimeapi.ContainerStatusResponse{}, nil); err != nil {
		t.Errorf("a small answer: %v", err)
	}

	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()

	if _, err := holdAnswer(short, "ContainerStatus", large, nil); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("no slot: %v, want ResourceExhausted", err)
	}
}

// TestSlotsReturn makes more calls of every kind than there are slots, also some that fail.
func TestSlotsReturn(t *testing.T) {
	l := &largeService{}
	conn, _ := serve(t, Services{Runtime: l, Image: l, Validate: func(any) error { return nil }, Log: quiet()})
	r, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	for range 2 * largeAnswers {
		l.fail.Store(true)
		if _, err := r.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); status.Code(err) != codes.Internal {
			t.Fatalf("a list that fails: %v", err)
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

// eventually waits until a condition holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in time")
		}
	}
}
