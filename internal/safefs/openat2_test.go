package safefs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOpenat2WhileOthersRename resolves ".." while another goroutine renames files elsewhere. The
// kernel interrupts such a resolution with EAGAIN.
func TestOpenat2WhileOthersRename(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "a"), 0o755); err != nil {
		t.Fatal(err)
	}

	a, b := filepath.Join(elsewhere, "a"), filepath.Join(elsewhere, "b")
	if err := os.WriteFile(a, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	root, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()

	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()

	var renames sync.WaitGroup
	renames.Go(func() {
		for ctx.Err() == nil {
			_ = os.Rename(a, b)
			_ = os.Rename(b, a)
		}
	})
	defer renames.Wait()

	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	for ctx.Err() == nil {
		fd, err := Openat2(int(root.Fd()), strings.Repeat("a/../", 100), &how)
		if err != nil {
			t.Error(err)
			return
		}

		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
	}
}
