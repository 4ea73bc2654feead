package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

const (
	// maxAccounts limits the images in the cache.
	maxAccounts = 512
	// maxFileLinks limits the symbolic links in the path of a file.
	maxFileLinks = 8
)

// accountCache has the accounts of images. The content behind an image ID never changes.
type accountCache struct {
	calls callGroup[*model.Accounts]

	mu   sync.Mutex // guards byID
	byID map[model.ImageID]*model.Accounts
}

func (c *accountCache) get(id model.ImageID) *model.Accounts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

// put adds the accounts of an image, in place of another one if the cache is full.
func (c *accountCache) put(id model.ImageID, a *model.Accounts) {
	c.mu.Lock()
	defer c.mu.Unlock()

	if c.byID == nil {
		c.byID = map[model.ImageID]*model.Accounts{}
	}
	for other := range c.byID {
		if len(c.byID) < maxAccounts {
			break
		}
		delete(c.byID, other)
	}

	c.byID[id] = a
}

// Accounts returns the users and groups of an image. The first call for an image creates a
// container, which is never started, reads the files from it (GET /containers/{id}/archive) and
// removes it. This takes 50 ms, or half a minute on a slow node, so only the callers' deadlines and
// those of the requests bound it. Files that no image needs are DataLoss, and files that the engine
// cannot open Internal.
func (e *Engine) Accounts(ctx context.Context, id model.ImageID) (*model.Accounts, error) {
	if a := e.accounts.get(id); a != nil {
		return a, nil
	}

	return e.accounts.calls.do(ctx, string(id), func(ctx context.Context) (*model.Accounts, error) {
		a, err := e.readAccounts(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("read the users of image %s: %w", id, err)
		}

		e.accounts.put(id, a)

		return a, nil
	})
}

// readAccounts reads the accounts of an image. If the engine does not remove the reader in time,
// the next recovery does (RemoveReaders).
func (e *Engine) readAccounts(ctx context.Context, id model.ImageID) (*model.Accounts, error) {
	reader := translate.NewReader(id)
	if _, err := e.Create(ctx, reader); err != nil && !errdefs.IsConflict(err) { // or of an interrupted call
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), trialRemovalTimeout)
		defer cancel()
		if err := ignore(e.remove(ctx, reader.Name), errdefs.IsNotFound); err != nil {
			e.cfg.Log.Warn("failed to remove the container that reads an image's users", "image", id, "err", err)
		}
	}()

	a := &model.Accounts{} // one file after the other, because the engine locks the container
	if err := e.readFile(ctx, reader.Name, "/etc/passwd", a.AddUsers); err != nil {
		return nil, err
	}

	return a, e.readFile(ctx, reader.Name, "/etc/group", a.AddGroups)
}

// readFile passes the content of a container's file to add.
func (e *Engine) readFile(ctx context.Context, container, file string, add func(io.Reader) error) error {
	f, err := e.openFile(ctx, container, file)
	if err != nil {
		return err
	}
	defer f.Close()

	if err := add(f); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}

	return nil
}

// openFile opens a regular file of a container, empty if there is none. It follows symbolic links
// within the container.
func (e *Engine) openFile(ctx context.Context, container, file string) (io.ReadCloser, error) {
	for range maxFileLinks {
		r, err := e.docker().CopyFromContainer(ctx, container, client.CopyFromContainerOptions{SourcePath: file})
		if errdefs.IsNotFound(err) {
			return io.NopCloser(eof{}), nil
		}
		if err != nil {
			return nil, wrap(err, "copy %s from container %s", file, container)
		}

		archive := tar.NewReader(r.Content)
		h, err := archive.Next()
		switch {
		case err != nil:
			return nil, errors.Join(wrap(err, "copy %s from container %s", file, container), r.Content.Close())
		case h.Typeflag == tar.TypeReg:
			return tarFile{archive, r.Content}, nil
		}

		if err := r.Content.Close(); err != nil {
			return nil, wrap(err, "copy %s from container %s", file, container)
		}
		if h.Typeflag != tar.TypeSymlink {
			return io.NopCloser(eof{}), nil
		}

		to := h.Linkname
		if !path.IsAbs(to) {
			// #nosec G305 -- the engine resolves the path beneath the container's root
			to = path.Join(path.Dir(file), to)
		}
		file = to
	}

	return io.NopCloser(eof{}), nil
}

// tarFile is a file in an archive from the engine.
type tarFile struct {
	io.Reader
	io.Closer
}

// eof is a reader without content.
type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// RemoveReaders removes the containers left by interrupted calls of Accounts, which would keep
// their images from being removed.
func (e *Engine) RemoveReaders(ctx context.Context) error {
	list, err := e.list(ctx, make(client.Filters).Add("name", "^/?"+translate.ReaderPrefix))
	if err != nil {
		return wrap(err, "list the readers of images")
	}

	var errs []error
	for _, c := range list {
		id, ok := translate.ImageOfReader(c.name())
		switch {
		case !ok:
		case e.accounts.get(id) == nil: // a call may be using it
			_, err := e.Accounts(ctx, id)
			errs = append(errs, err)
		default:
			errs = append(errs, ignore(e.remove(ctx, c.ID), errdefs.IsNotFound))
		}
	}

	return errors.Join(errs...)
}
