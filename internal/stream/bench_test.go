package stream

import (
	"context"
	"io"
	"net/http"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"cri-dockerd/internal/engine"
)

// BenchmarkOutput streams the output of a command over loopback, in pieces of the engine's message
// size.
func BenchmarkOutput(b *testing.B) {
	const piece, size = 32 << 10, 256 << 20
	f := fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		data := make([]byte, piece)
		for range size / piece {
			if _, err := x.Stdout.Write(data); err != nil {
				return 0, err
			}
		}
		return 0, nil
	}}

	s, err := New(Config{Runtime: f, Log: discard})
	if err != nil {
		b.Fatal(err)
	}

	go s.Serve() //nolint:errcheck // ends with Close
	defer s.Close()

	url := func() string {
		u, err := s.urlOf("exec", &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"cat"}, Stdout: true})
		if err != nil {
			b.Fatal(err)
		}
		return u
	}

	b.Run("SPDY", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			session, err := spdy.NewClientConnection(upgradeSPDY(b, url(), "v4.channel.k8s.io"))
			if err != nil {
				b.Fatal(err)
			}

			if _, err := session.CreateStream(http.Header{"Streamtype": {"error"}}); err != nil {
				b.Fatal(err)
			}

			out, err := session.CreateStream(http.Header{"Streamtype": {"stdout"}})
			if err != nil {
				b.Fatal(err)
			}

			if n, err := io.Copy(io.Discard, out); n != size || err != nil {
				b.Fatal(n, err)
			}

			session.Close()
		}
	})

	b.Run("WebSocket", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			c := mustOpen(b, url())
			total := int64(0)
			for {
				_, m, err := c.NextReader()
				if err != nil {
					break
				}
				n, _ := io.Copy(io.Discard, m)
				total += n
			}

			if total < size {
				b.Fatal(total)
			}
		}
	})
}
