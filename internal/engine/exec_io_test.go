package engine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
)

// pieces is a reader with reads of random sizes.
type pieces struct {
	data   []byte
	random *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.data) == 0 {
		return 0, io.EOF
	}
	n := min(len(b), len(p.data), 1+p.random.IntN(1<<p.random.IntN(18)))
	copy(b, p.data[:n])
	p.data = p.data[n:]
	return n, nil
}

// outputMessages returns random messages of the engine, their boundaries, and their output.
func outputMessages(random *rand.Rand) (messages []byte, boundaries map[int]bool, stdout, stderr []byte) {
	boundaries = map[int]bool{0: true}
	for range 1 + random.IntN(40) {
		data := make([]byte, random.IntN(1<<random.IntN(18)))
		for i := range data {
			data[i] = byte(random.Uint32())
		}

		stream := stdcopy.Stdout
		if random.IntN(3) == 0 {
			stream = stdcopy.Stderr
			stderr = append(stderr, data...)
		} else {
			stdout = append(stdout, data...)
		}

		messages = append(messages, byte(stream), 0, 0, 0)
		messages = binary.BigEndian.AppendUint32(messages, uint32(len(data)))
		messages = append(messages, data...)
		boundaries[len(messages)] = true
	}

	return messages, boundaries, stdout, stderr
}

// TestDemultiplexer checks that each stream gets its bytes in order for any sizes of messages and
// reads, and that a truncated message is an error.
func TestDemultiplexer(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		messages, boundaries, stdout, stderr := outputMessages(random)
		var out, errOut bytes.Buffer
		err := copyOutput(&pieces{messages, random}, Streams{Stdout: &out, Stderr: &errOut})
		if err != nil || !bytes.Equal(out.Bytes(), stdout) || !bytes.Equal(errOut.Bytes(), stderr) {
			t.Fatalf("stdout: %d of %d bytes, stderr: %d of %d bytes, error %v", out.Len(), len(stdout),
				errOut.Len(), len(stderr), err)
		}

		cut := random.IntN(len(messages))
		out.Reset()
		errOut.Reset()
		err = copyOutput(&pieces{messages[:cut], random}, Streams{Stdout: &out, Stderr: &errOut})
		if errors.Is(err, errIncomplete) == boundaries[cut] {
			t.Fatalf("truncated after %d bytes: %v", cut, err)
		}

		if !bytes.HasPrefix(stdout, out.Bytes()) || !bytes.HasPrefix(stderr, errOut.Bytes()) {
			t.Fatalf("truncated after %d bytes: the output is not a prefix of the input", cut)
		}
	}
}

// TestFirstMessageIsSeparate checks that the first write contains only the first message, because
// it may be the engine's error message for a failed start.
func TestFirstMessageIsSeparate(t *testing.T) {
	for name, read := range map[string]func(io.Reader) io.Reader{
		"one read": func(r io.Reader) io.Reader { return r },
		"several reads": func(r io.Reader) io.Reader {
			return io.MultiReader(io.LimitReader(r, 3), io.LimitReader(r, 9), r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var writes writeLog
			sent := append(message("exec failed\r\n"), append(message("more"), message("and more")...)...)
			if err := copyOutput(read(bytes.NewReader(sent)), Streams{Stdout: &writes}); err != nil {
				t.Fatal(err)
			}

			if len(writes) == 0 || writes[0] != "exec failed\r\n" {
				t.Errorf("unexpected writes %q", writes)
			}
		})
	}
}

type writeLog []string

func (w *writeLog) Write(p []byte) (int, error) {
	*w = append(*w, string(p))
	return len(p), nil
}

// TestUnreadInput lets the engine close a connection with unread input, as after input that
// was typed ahead. The output arrives and the exec does not fail.
func TestUnreadInput(t *testing.T) {
	for name, tty := range map[string]bool{"terminal": true, "streams": false} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "socket")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()

			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()

			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "input"); err != nil {
				t.Fatal(err)
			}

			output := []byte("bye")
			if !tty {
				output = message("bye")
			}
			if _, err := server.Write(output); err != nil {
				t.Fatal(err)
			}
			if err := server.Close(); err != nil {
				t.Fatal(err)
			}

			var got bytes.Buffer
			if err := copyOutput(conn, Streams{TTY: tty, Stdout: &got}); err != nil || got.String() != "bye" {
				t.Errorf("output %q, error %v", got.String(), err)
			}
		})
	}
}

// sizedReads is a reader with reads of these sizes in bytes.
type sizedReads []int

func (r *sizedReads) Read(p []byte) (int, error) {
	n := (*r)[0]
	*r = (*r)[1:]
	return min(n, len(p)), nil
}

// TestDelayAdapts checks that small reads lengthen the delay of the next one, that full ones
// shorten it, and that both ends are bounded.
func TestDelayAdapts(t *testing.T) {
	const full = outputBufferSize
	sizes := sizedReads{full, 1, 1, 1, 1, 1, full / 2, full, full, full, full, 1}
	want := []time.Duration{1, 2, 4, 8, 8, 8, 8, 4, 2, 1, 1, 2}
	r := coalescingReader{Reader: &sizes}
	for i, units := range want {
		if _, err := r.Read(make([]byte, full)); err != nil {
			t.Fatal(err)
		}
		if r.delay != units*minDelay {
			t.Errorf("after read %d: the delay is %v, want %v", i, r.delay, units*minDelay)
		}
	}
}
