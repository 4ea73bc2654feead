package imagefs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Usage is what files take.
type Usage struct {
	Bytes  uint64 // allocated by the file system
	Inodes uint64
}

func (u *Usage) add(other Usage) {
	u.Bytes += other.Bytes
	u.Inodes += other.Inodes
}

// blockSize is the unit of st_blocks, whatever the file system's own (stat(3type)).
const blockSize = 512

// usage walks a file or directory. A file with several names counts once; what vanishes meanwhile counts nothing. Errors are ctx's.
func usage(ctx context.Context, root string) (u Usage, err error) {
	type inode struct{ dev, ino uint64 }
	linked := map[inode]bool{}
	err = filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return nil //nolint:nilerr // gone, or not to be read: it counts nothing
		}
		info, err := e.Info()
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if !e.IsDir() && st.Nlink > 1 {
			id := inode{uint64(st.Dev), st.Ino}
			if linked[id] {
				return nil
			}
			linked[id] = true
		}
		u.add(Usage{Bytes: uint64(st.Blocks) * blockSize, Inodes: 1})
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return u, err
}

// device is the file system that a path is on, 0 if it is not there.
func device(path string) uint64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return uint64(st.Dev)
}
