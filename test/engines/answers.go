package engines

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cri-dockerd/test/answers"
)

// checked fails a test if a response of the daemon would crash a kubelet. The call itself fails
// with DataLoss.
type checked struct {
	mu  sync.Mutex // guards err
	err error      // the first error
}

func (c *checked) check(method string, answer any) error {
	err := answers.Check(answer)
	if err == nil {
		return nil
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	if c.err == nil {
		c.err = err
	}

	return status.Errorf(codes.DataLoss, "response to %s: %v", method, err)
}

// options returns dial options to check each response.
func (c *checked) options() []grpc.DialOption {
	unary := func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker,
		opts ...grpc.CallOption) error {
		if err := call(ctx, method, req, reply, conn, opts...); err != nil {
			return err
		}
		return c.check(method, reply)
	}

	stream := func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
		opts ...grpc.CallOption) (grpc.ClientStream, error) {
		s, err := open(ctx, desc, conn, method, opts...)
		return &checkedStream{ClientStream: s, method: method, checked: c}, err
	}

	return []grpc.DialOption{grpc.WithUnaryInterceptor(unary), grpc.WithStreamInterceptor(stream)}
}

// end fails the test after any bad response.
func (c *checked) end(tb TB) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		tb.Fatalf("response of the daemon: %v", c.err)
	}
}

type checkedStream struct {
	grpc.ClientStream
	method  string
	checked *checked
}

func (s *checkedStream) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil {
		return err
	}
	return s.checked.check(s.method, m)
}
