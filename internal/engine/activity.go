package engine

import (
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// activity records the last progress of any download of the engine. Pulls of this program report it
// by their messages. With containerd's image store, the written files show all other pulls too. It
// is safe for concurrent use.
type activity struct {
	last atomic.Int64 // Unix time in nanoseconds
	// store is the engine's data directory, nil without containerd's image store.
	store atomic.Pointer[string]
}

func (a *activity) record() { a.last.Store(time.Now().UnixNano()) }

// idleTime returns the time since the last progress.
func (a *activity) idleTime() time.Duration {
	last := time.Unix(0, a.last.Load())
	if root := a.store.Load(); root != nil {
		for _, dir := range []string{filepath.Join(*root, "containerd/daemon"), "/var/lib/containerd"} {
			if written := lastWritten(filepath.Join(dir, ingests)); written.After(last) {
				last = written
			}
		}
	}

	return time.Since(last)
}

// ingests is the download directory of containerd's content store. Each download has a subdirectory
// with its bytes in the file "data" (containerd, plugins/content/local).
const ingests = "io.containerd.content.v1.content/ingest"

// lastWritten returns the time of the last write to any download. It returns the zero time if there
// are no downloads, or if the engine's files are not accessible here.
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
