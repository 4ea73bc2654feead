// Package archive writes the archives of checkpointed containers. Their files have the names and
// formats of containerd and CRI-O, so the tools for checkpoints read them.
package archive

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Files of an archive.
const (
	Images = "checkpoint"      // directory of criu's images
	Config = "config.dump"     // Container as JSON
	Layer  = "rootfs-diff.tar" // changes of the root as a layer (OCI image-spec, layer.md)
	Dump   = "dump.log"        // criu's log
)

// whiteout is the prefix of a removed file in a layer.
const whiteout = ".wh."

// Container describes the container of an archive (checkpointctl, lib/metadata).
type Container struct {
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	Image          string    `json:"rootfsImage"`
	ImageRef       string    `json:"rootfsImageRef,omitempty"`
	ImageName      string    `json:"rootfsImageName,omitempty"`
	Runtime        string    `json:"runtime,omitempty"`
	CreatedAt      time.Time `json:"createdTime"`
	CheckpointedAt time.Time `json:"checkpointedTime"`
}

// WriteConfig writes the description of a container into the directory of its archive.
func WriteConfig(dir *os.Root, c Container) error {
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return dir.WriteFile(Config, text, 0o600)
}

// Changes are the changed and the removed paths of a container's root, without a leading slash.
type Changes struct {
	Changed map[string]bool
	Removed []string
}

// WriteLayer copies the changed files of root, a tar archive of a container's whole root, to w as a
// layer, with whiteouts for the removed files.
func WriteLayer(w io.Writer, root io.Reader, c Changes) error {
	in, out := tar.NewReader(root), tar.NewWriter(w)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if !c.Changed[strings.Trim(path.Clean(h.Name), "/")] {
			continue
		}

		if err := out.WriteHeader(h); err != nil {
			return err
		}
		// #nosec G110 -- a copy of the container's own changes, without decompression
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}

	for _, name := range slices.Sorted(slices.Values(c.Removed)) {
		dir, file := path.Split(name)
		if err := out.WriteHeader(&tar.Header{Name: dir + whiteout + file, Mode: 0o600}); err != nil {
			return err
		}
	}

	return out.Close()
}

// Pack writes all files and directories beneath dir to w as a tar archive.
func Pack(w io.Writer, dir *os.Root) error {
	out := tar.NewWriter(w)
	if err := out.AddFS(dir.FS()); err != nil {
		return fmt.Errorf("pack %s: %w", dir.Name(), err)
	}
	return out.Close()
}
