package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// pack returns a tar archive of files with their contents; a name that ends in a slash is a
// directory.
func pack(t *testing.T, files map[string]string) *bytes.Buffer {
	t.Helper()
	b := &bytes.Buffer{}
	w := tar.NewWriter(b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}

	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	return b
}

// unpack returns the names of an archive in their order, with the contents of files.
func unpack(t *testing.T, r io.Reader) (all []string) {
	t.Helper()
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}

		b, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}

		all = append(all, h.Name+"="+string(b))
	}
}

// TestWriteLayer expects the changed files, and a whiteout for each removed one.
func TestWriteLayer(t *testing.T) {
	root := pack(t, map[string]string{
		"bin/":        "",
		"bin/sh":      "program",
		"./etc/hosts": "new",
		"data/":       "",
		"data/a":      "a",
	})
	var out bytes.Buffer
	err := WriteLayer(&out, root, Changes{
		Changed: map[string]bool{"etc": true, "etc/hosts": true, "data": true, "data/a": true, "gone": true},
		Removed: []string{"old", "etc/group"},
	})
	if err != nil {
		t.Fatal(err)
	}

	want := []string{"./etc/hosts=new", "data/=", "data/a=a", "etc/.wh.group=", ".wh.old="}
	if got := unpack(t, &out); !slices.Equal(got, want) {
		t.Errorf("layer %q, want %q", got, want)
	}
}

// TestWriteLayerOfAPartialExport expects an error instead of a layer that lacks files.
func TestWriteLayerOfAPartialExport(t *testing.T) {
	root := pack(t, map[string]string{"a": strings.Repeat("a", 2000)})
	root.Truncate(1000)
	if err := WriteLayer(io.Discard, root, Changes{Changed: map[string]bool{"a": true}}); err == nil {
		t.Error("no error")
	}
}

// TestPack expects all files.
func TestPack(t *testing.T) {
	dir, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()

	at := time.Unix(1, 0).UTC()
	if err := errors.Join(dir.Mkdir(Images, 0o700), dir.WriteFile(Images+"/pages-1.img", []byte("pages"), 0o600),
		WriteConfig(dir, Container{ID: "c", Name: "n", Image: "i", CreatedAt: at, CheckpointedAt: at})); err != nil {
		t.Fatal(err)
	}

	var out bytes.Buffer
	if err := Pack(&out, dir); err != nil {
		t.Fatal(err)
	}

	config := `{"id":"c","name":"n","rootfsImage":"i","createdTime":"1970-01-01T00:00:01Z",` +
		`"checkpointedTime":"1970-01-01T00:00:01Z"}`
	want := []string{"checkpoint/=", "checkpoint/pages-1.img=pages", "config.dump=" + config}
	if got := unpack(t, &out); !slices.Equal(got, want) {
		t.Errorf("archive %q, want %q", got, want)
	}
}
