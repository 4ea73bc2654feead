package engine

import (
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// movement remembers when a download of the engine moved last: a pull of ours by its messages, and
// with containerd's image store any pull by the files that it writes. It is safe for concurrent
// use.
type movement struct {
	last atomic.Int64 // nanoseconds of Unix time
	// the engine's data directory, nil without containerd's image store
	store atomic.Pointer[string]
}

func (m *movement) note() { m.last.Store(time.Now().UnixNano()) }

// since returns how long nothing has moved.
func (m *movement) since() time.Duration {
	last := time.Unix(0, m.last.Load())
	if root := m.store.Load(); root != nil {
		for _, dir := range []string{filepath.Join(*root, "containerd/daemon"), "/var/lib/containerd"} {
			if written := lastWritten(filepath.Join(dir, ingests)); written.After(last) {
				last = written
			}
		}
	}

	return time.Since(last)
}

// ingests is where containerd's content store writes what it downloads: one directory for each
// download, with its bytes in the file "data" (containerd, plugins/content/local).
const ingests = "io.containerd.content.v1.content/ingest"

// lastWritten returns when bytes of any download were written last; zero if there are none, or the
// engine's files cannot be seen here.
func lastWritten(dir string) (last time.Time) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return time.Time{}
	}
	defer root.Close() //nolint:errcheck // it was only read

	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return time.Time{}
	}

	for _, e := range entries {
		if st, err := root.Lstat(e.Name() + "/data"); err == nil && st.ModTime().After(last) {
			last = st.ModTime()
		}
	}

	return last
}
