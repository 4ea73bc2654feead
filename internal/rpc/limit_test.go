package rpc

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	grpccreds "google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// serveTCP serves on a TCP endpoint and returns its address.
func serveTCP(t *testing.T, files TLSFiles) string {
	t.Helper()
	l, err := Listen("tcp://127.0.0.1:0", files)
	if err != nil {
		t.Fatal(err)
	}

	s := &service{}
	srv := New(Services{Runtime: s, Image: s, Validate: func(any) error { return nil }, Log: quiet()})
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop(time.Second)
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})

	return l.Addr().String()
}

// pull sends a call on a new connection.
func pull(t *testing.T, addr string, creds grpccreds.TransportCredentials) error {
	t.Helper()
	c, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()

	_, err = runtimeapi.NewImageServiceClient(c).PullImage(ctx, &runtimeapi.PullImageRequest{})

	return err
}

// TestHostileConnections checks that silent connections, and connections with other data than
// HTTP/2, do not lock out a client and are closed.
func TestHostileConnections(t *testing.T) {
	files, client := newCertificate(t)
	for name, test := range map[string]struct {
		files TLSFiles
		creds grpccreds.TransportCredentials
	}{
		"plain": {TLSFiles{}, insecure.NewCredentials()},
		"TLS": {files, grpccreds.NewTLS(&tls.Config{
			InsecureSkipVerify: true, //nolint:gosec // this test does not verify the server
			Certificates:       []tls.Certificate{client},
		})},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := serveTCP(t, test.files)
			var conns []net.Conn
			for i := range 300 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()

				conns = append(conns, c)
				_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // the server may have closed it
				if i%3 == 1 {
					_, _ = io.WriteString(c, strings.Repeat("garbage", 1000))
				}
			}

			if err := pull(t, addr, test.creds); err != nil {
				t.Errorf("client next to silent connections: %v", err)
			}

			deadline := time.Now().Add(handshakeTimeout + 5*time.Second)
			for _, c := range conns {
				_ = c.SetReadDeadline(deadline)
				if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
					t.Fatalf("silent connection still open: %v", err)
				}
			}
		})
	}
}

// TestConnectionLimit checks the limit of connections per address.
func TestConnectionLimit(t *testing.T) {
	addr := serveTCP(t, TLSFiles{})
	var last *grpc.ClientConn
	for range tcpLimits.KeptPerPeer {
		c, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()

		if _, err := runtimeapi.NewImageServiceClient(c).PullImage(t.Context(), &runtimeapi.PullImageRequest{}); err !=
			nil {
			t.Fatal(err)
		}

		last = c
	}

	if err := pull(t, addr, insecure.NewCredentials()); err == nil {
		t.Error("connection over the limit accepted")
	}

	last.Close()
	for deadline := time.Now().Add(5 * time.Second); pull(t, addr, insecure.NewCredentials()) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the closed connection still counts against the limit")
		}
	}
}
