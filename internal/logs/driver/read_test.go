package driver

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// logsOf reads a log like docker logs. next returns its lines.
func logsOf(ctx context.Context, t *testing.T, url string, c *container, cfg readConfig) (next func() (string, bool)) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"Info": c.info(), "Config": cfg})
	if err != nil {
		t.Fatal(err)
	}

	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/LogDriver.ReadLogs", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}

	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("ReadLogs: %v, %v", resp, err)
	}

	t.Cleanup(func() { resp.Body.Close() })

	return func() (string, bool) {
		head := make([]byte, prefixSize)
		if _, err := io.ReadFull(resp.Body, head); err != nil {
			return "", false
		}

		body := make([]byte, binary.BigEndian.Uint32(head))
		if _, err := io.ReadFull(resp.Body, body); err != nil {
			t.Fatal(err)
		}

		f, err := decode(body)
		if err != nil {
			t.Fatal(err)
		}

		return string(f.Line), true
	}
}

func all(next func() (string, bool)) (out []string) {
	for s, ok := next(); ok; s, ok = next() {
		out = append(out, s)
	}
	return out
}

// logged is a container with a log to read, and the driver's server.
type logged struct {
	*container
	t   *testing.T
	d   *Driver
	url string
}

func newLogged(t *testing.T) *logged {
	t.Helper()
	d, e := newDriver(t, t.TempDir())
	server := httptest.NewServer(d.Handler())
	t.Cleanup(func() { http.DefaultClient.CloseIdleConnections(); server.Close() })
	return &logged{e.container("aa"), t, d, server.URL}
}

func (l *logged) read(cfg readConfig) (next func() (string, bool)) {
	return logsOf(l.t.Context(), l.t, l.url, l.container, cfg)
}

// rotate renames the log like the kubelet, and optionally compresses it.
func (l *logged) rotate(name string, compress bool) {
	l.t.Helper()
	s := l.container.stream(l.d)
	s.lock()
	s.drainLocked()
	s.unlock()
	log := l.log.String()
	b, err := os.ReadFile(log)
	if err != nil {
		l.t.Fatal(err)
	}

	if compress {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(b)
		w.Close()
		err = errors.Join(os.WriteFile(log+name+".gz", z.Bytes(), 0o600), os.Remove(log))
	} else {
		err = os.Rename(log, log+name)
	}

	if err := errors.Join(err, l.d.Reopen(l.t.Context(), l.id)); err != nil {
		l.t.Fatal(err)
	}
}

func TestReadLogs(t *testing.T) {
	l := newLogged(t)
	if got := all(l.read(readConfig{Tail: -1})); got != nil {
		t.Errorf("read before the start: %q", got)
	}

	l.start()
	l.print("1", "2")
	l.rotate(".20260102-030405", true)
	l.print("3", "4")
	l.rotate(".20260102-030406", false)
	if _, err := l.fifo.Write(l.frame(frame{Source: "stdout", Line: []byte("5"), Partial: true}, false)); err != nil {
		t.Fatal(err)
	}

	l.print("", "6")
	if err := os.WriteFile(l.log.String()+".20260102-030406.tmp", []byte("being compressed"), 0o600); err != nil {
		t.Fatal(err)
	}

	eventually(t, "written", func() bool { return len(texts(t, l.log.String())) == 3 })
	for _, test := range []struct {
		cfg  readConfig
		want []string
	}{
		{readConfig{Tail: -1}, []string{"1\n", "2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 0}, nil},
		{readConfig{Tail: 1}, []string{"6\n"}},
		{readConfig{Tail: 3}, []string{"4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 5}, []string{"2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: 100}, []string{"1\n", "2\n", "3\n", "4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: -1, Since: began.Add(4)}, []string{"4\n", "5", "\n", "6\n"}},
		{readConfig{Tail: -1, Until: began.Add(2)}, []string{"1\n", "2\n"}},
	} {
		t.Run(fmt.Sprintf("%+v", test.cfg), func(t *testing.T) {
			if diff := cmp.Diff(test.want, all(l.read(test.cfg))); diff != "" {
				t.Error(diff)
			}
		})
	}

	l.stop()
}

func TestFollow(t *testing.T) {
	l := newLogged(t)
	l.start()
	l.print("1", "2", "3")
	eventually(t, "written", func() bool { return len(texts(t, l.log.String())) == 3 })
	next := l.read(readConfig{Tail: 2, Follow: true})
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got, ok := next(); got != w || !ok {
				t.Fatalf("follow: %q, want %q", got, w)
			}
		}
	}

	expect("2\n", "3\n")
	for i := range 10 {
		l.print(fmt.Sprint("new ", i))
		expect(fmt.Sprintf("new %d\n", i))
		l.rotate(fmt.Sprintf(".20260102-0305%02d", i), i%2 == 0)
	}

	none := l.read(readConfig{Tail: 0, Follow: true})
	l.print("last")
	l.stop()
	expect("last\n")
	if s, ok := next(); ok {
		t.Errorf("line after the end: %q", s)
	}
	if diff := cmp.Diff([]string{"last\n"}, all(none)); diff != "" {
		t.Errorf("lines from now on: %s", diff)
	}

	ctx, cancel := context.WithCancel(t.Context())
	c2 := l.e.container("bb")
	c2.start()
	canceled := logsOf(ctx, t, l.url, c2, readConfig{Tail: -1, Follow: true})
	cancel() // a canceled reader must not leak
	_, _ = canceled()
	c2.stop()
}
