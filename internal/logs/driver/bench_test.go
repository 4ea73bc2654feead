package driver

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkLines measures the process's cost of a line of 100 bytes, without the engine's.
func BenchmarkLines(b *testing.B) {
	c := &container{e: &fakeEngine{}}
	chunk := bytes.Buffer{}
	const lines = 400
	for range lines {
		chunk.Write(c.frame(frame{Source: "stdout", Line: []byte(strings.Repeat("x", 99))}, false))
	}

	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])

	log, err := os.Create(b.TempDir() + "/log")
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()

	d, err := New(Config{Directory: b.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()

	s := &stream{
		shared: &d.shared,
		fifo:   fds[0],
		log:    log,
		busy:   make(chan struct{}, 1),
		losses: newLosses(d.logger, d.metrics),
		spill:  &spill{},
	}

	b.SetBytes(lines * 100)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if _, err := unix.Write(fds[1], chunk.Bytes()); err != nil {
			b.Fatal(err)
		}

		for pending := chunk.Len(); pending > 0; {
			k, err := s.moveLocked()
			if err != nil {
				b.Fatal(err)
			}
			pending -= k
		}

		if n%1000 == 999 {
			_ = log.Truncate(0)
			_, _ = log.Seek(0, 0)
		}
	}

	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*lines), "ns/line")
}
