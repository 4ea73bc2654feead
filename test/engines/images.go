package engines

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/moby/moby/client"
)

const busybox = "/bin/busybox" // Debian's package busybox-static

// ImportBusybox makes an image with a shell and the usual small programs, without a registry, and returns its name.
func (e *Engine) ImportBusybox(tb TB) string {
	tb.Helper()
	program, err := os.ReadFile(busybox)
	if err != nil {
		tb.Fatalf("busybox image: %v; install busybox-static", err)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		tb.Fatalf("busybox image: %v", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			tb.Fatalf("busybox image: %v", err)
		}
		if _, err := w.Write(content); err != nil {
			tb.Fatalf("busybox image: %v", err)
		}
	}
	for _, dir := range []string{"bin/", "etc/", "tmp/"} {
		add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	}
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, program)
	add(tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n"))
	add(tar.Header{Name: "etc/group", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:\napp:x:1000:\nextra:x:7777:app\n"))
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			add(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatalf("busybox image: %v", err)
	}
	const ref = "cri-test/busybox:latest"
	r, err := e.Docker(tb).ImageImport(context.Background(), client.ImageImportSource{Source: &b, SourceName: "-"}, ref, client.ImageImportOptions{Changes: []string{"ENV PATH=/bin"}})
	if err == nil {
		_, err = io.Copy(io.Discard, r)
		r.Close()
	}
	if err != nil {
		tb.Fatalf("busybox image: %v", err)
	}
	return ref
}
