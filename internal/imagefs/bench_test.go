package imagefs

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkSmallLayer walks a typical writable layer: a few directories and files.
func BenchmarkSmallLayer(b *testing.B) {
	dir := b.TempDir()
	for i := range 3 {
		if err := os.MkdirAll(filepath.Join(dir, "diff", fmt.Sprint("d", i)), 0o755); err != nil {
			b.Fatal(err)
		}
	}

	root, err := os.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer root.Close()

	b.ReportAllocs()
	for b.Loop() {
		w, err := newWalk(root, "diff")
		if err != nil {
			b.Fatal(err)
		}

		if _, err := w.run(b.Context().Err, time.Second); err != nil {
			b.Fatal(err)
		}

		w.close()
	}
}
