package engines

import (
	"archive/tar"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/moby/moby/client"
)

const busybox = "/bin/busybox" // Debian's package busybox-static

// Busybox is the image of ImportBusybox and LoadBusybox.
const Busybox = "cri-test/busybox:latest"

// ImportBusybox creates an image with a shell and basic tools, without a registry, and returns its
// name.
func (e *Engine) ImportBusybox(tb TB) string {
	tb.Helper()
	LoadBusybox(tb, e.Socket)
	return Busybox
}

// LoadBusybox does the same with the engine at a unix socket.
func LoadBusybox(tb TB, socket string) {
	tb.Helper()
	files := append(BusyboxFiles(tb),
		File{
			Header:  tar.Header{Name: "etc/passwd", Mode: 0o644},
			Content: []byte("root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n"),
		},
		File{
			Header:  tar.Header{Name: "etc/group", Mode: 0o644},
			Content: []byte("root:x:0:\napp:x:1000:\nextra:x:7777:app\n"),
		})

	Import(tb, socket, Busybox, files, "ENV PATH=/bin")
}

// BusyboxFiles returns the files of an image with a shell and basic tools in /bin.
func BusyboxFiles(tb TB) []File {
	tb.Helper()
	return BusyboxFilesOf(tb, busybox)
}

// BusyboxFilesOf is BusyboxFiles with another static busybox.
func BusyboxFilesOf(tb TB, busybox string) []File {
	tb.Helper()
	program, err := os.ReadFile(busybox)
	if err != nil {
		tb.Fatalf("busybox image: %v; install busybox-static or run hack/busybox.sh", err)
	}

	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		tb.Fatalf("busybox image: %v", err)
	}

	var files []File
	for _, dir := range []string{"bin/", "etc/", "tmp/"} {
		files = append(files, File{Header: tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o1777}})
	}

	files = append(files, File{Header: tar.Header{Name: "bin/busybox", Mode: 0o755}, Content: program})
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			files = append(files, File{Header: tar.Header{
				Name:     "bin/" + a,
				Typeflag: tar.TypeSymlink,
				Linkname: "busybox",
			}})
		}
	}

	return files
}

// File is an entry in an image's only layer. The zero type is a regular file.
type File struct {
	Header  tar.Header
	Content []byte
}

// Import creates an image of one layer at the engine with this unix socket. changes are lines of a
// Dockerfile.
func Import(tb TB, socket, ref string, files []File, changes ...string) {
	tb.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(writeLayer(w, files)) }()
	c, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		tb.Fatalf("image %s: %v", ref, err)
	}
	defer c.Close()

	answer, err := c.ImageImport(context.Background(), client.ImageImportSource{Source: r, SourceName: "-"}, ref,
		client.ImageImportOptions{Changes: changes})
	if err == nil {
		_, err = io.Copy(io.Discard, answer)
		answer.Close()
	}

	if err != nil {
		tb.Fatalf("image %s: %v", ref, err)
	}
}

func writeLayer(to io.Writer, files []File) error {
	w := tar.NewWriter(to)
	for _, f := range files {
		f.Header.Size = int64(len(f.Content))
		if err := w.WriteHeader(&f.Header); err != nil {
			return err
		}
		if _, err := w.Write(f.Content); err != nil {
			return err
		}
	}

	return w.Close()
}
