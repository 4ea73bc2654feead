package adjustment

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/rootonly"
)

var id = strings.Repeat("0a", idLength/2)

func encode(t *testing.T, a *api.ContainerAdjustment) []byte {
	t.Helper()
	b, err := Encode(a)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadReturnsWhatWasEncoded(t *testing.T) {
	want := &api.ContainerAdjustment{Args: []string{"a", "b"}, Annotations: map[string]string{"k": "v"}}
	dir := newDirectory(t)
	if err := os.WriteFile(filepath.Join(dir, id), encode(t, want), 0o600); err != nil {
		t.Fatal(err)
	}

	got, err := Read(dir, id)
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("Read returned %v, %v; want %v", got, err, want)
	}
}

func TestReadReturnsNilForNoAdjustments(t *testing.T) {
	dir := newDirectory(t)
	if err := os.WriteFile(filepath.Join(dir, id), encode(t, &api.ContainerAdjustment{}), 0o600); err != nil {
		t.Fatal(err)
	}

	if got, err := Read(dir, id); err != nil || got != nil {
		t.Errorf("Read returned %v, %v; want nil", got, err)
	}
}

// newDirectory returns a directory that only root can change. It is not beneath /tmp itself, where
// everybody can create files.
func newDirectory(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "nri")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestReadRejects(t *testing.T) {
	valid := encode(t, &api.ContainerAdjustment{})
	unknown := append(bytes.Clone(valid), 0xf8, 0x01, 0x01) // field 31
	tests := map[string]struct {
		id      string
		content []byte
		mode    os.FileMode
		want    error // nil for any
	}{
		"missing":            {id: id, want: os.ErrNotExist},
		"not an ID":          {id: "../" + id[3:], content: valid, mode: 0o600},
		"another version":    {id: id, content: []byte("cri-dockerd NRI adjustment 2\n"), mode: 0o600},
		"unknown field":      {id: id, content: unknown, mode: 0o600},
		"too large":          {id: id, content: append(bytes.Clone(valid), make([]byte, maxSize)...), mode: 0o600},
		"writable by others": {id: id, content: valid, mode: 0o622},
	}

	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := newDirectory(t)
			if tt.content != nil {
				file := filepath.Join(dir, id)
				if err := errors.Join(os.WriteFile(file, tt.content, 0o600), os.Chmod(file, tt.mode)); err != nil {
					t.Fatal(err)
				}
			}

			a, err := Read(dir, tt.id)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("Read returned %v, %v; want an error", a, err)
			}
		})
	}
}

func TestReadRejectsAForeignDirectory(t *testing.T) {
	dir := newDirectory(t)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, id), encode(t, &api.ContainerAdjustment{}), 0o600),
		os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}

	var foreign *rootonly.FileError
	if _, err := Read(dir, id); !errors.As(err, &foreign) {
		t.Errorf("a directory writable by everybody: %v", err)
	}
}

func TestEncodeRejectsTooMuch(t *testing.T) {
	if _, err := Encode(&api.ContainerAdjustment{Args: []string{strings.Repeat("x", maxSize)}}); err == nil {
		t.Error("Encode accepted more than the maximum")
	}
}
