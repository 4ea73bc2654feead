package rpc

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exhausted is a listener without descriptors for its first connections.
type exhausted struct {
	net.Listener
	fails atomic.Int32
}

func (l *exhausted) Accept() (net.Conn, error) {
	if l.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// TestAcceptWithoutDescriptors checks that the server backs off when it runs out of descriptors,
// and resumes accepting.
func TestAcceptWithoutDescriptors(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s.sock")
	inner, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	l := &exhausted{Listener: inner}
	l.fails.Store(6) // delays of 5, 10, … 160 ms
	s := New(Services{
		Runtime:  &service{},
		Image:    &service{},
		Log:      slog.New(slog.DiscardHandler),
		Validate: func(any) error { return nil },
	})

	ended := make(chan error)
	go func() { ended <- s.Serve(l) }()
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	if _, err := runtimeapi.NewImageServiceClient(c).PullImage(ctx, &runtimeapi.PullImageRequest{}); err != nil {
		t.Error(err)
	}

	if n := l.fails.Load(); n >= 0 || n < -4 {
		t.Errorf("%d attempts after the shortage", -n)
	}

	s.Stop(time.Second)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
