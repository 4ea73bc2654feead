// Package pause holds the embedded pause image: a program of a few hundred bytes for each
// architecture (source in src, made by build), and the image around it that docker load takes. A
// pod needs no registry to start.
package pause

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	_ "embed" // for the programs
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

//go:embed bin/pause-amd64
var amd64 []byte

//go:embed bin/pause-arm64
var arm64 []byte

// Repository is the local name of the embedded image; its tag is the program's hash.
const Repository = "cri-dockerd.local/pause"

// Image is the embedded image for one architecture.
type Image struct {
	Ref        string   // its local name
	Archive    []byte   // for POST /images/load
	DiffID     string   // of its only layer ("sha256:…"), by which the content can be recognised
	Entrypoint []string // its only process
}

// New returns the embedded image for an architecture, in Go's words ("amd64") or the engine's
// ("x86_64"). Equal programs give equal bytes.
func New(arch string) (Image, error) {
	program, goarch := amd64, "amd64"
	switch arch {
	case "amd64", "x86_64":
	case "arm64", "aarch64":
		program, goarch = arm64, "arm64"
	default:
		return Image{}, fmt.Errorf("embedded pause image: none for architecture %q; name one with "+
			"--pod-infra-container-image", arch)
	}

	sum := sha256.Sum256(program)
	files := map[string][]byte{"pause": program}
	layer, err := pack(files, programMode)
	if err != nil {
		return Image{}, err
	}

	diff := sha256.Sum256(layer)
	img := Image{
		Ref:        Repository + ":" + hex.EncodeToString(sum[:6]),
		DiffID:     "sha256:" + hex.EncodeToString(diff[:]),
		Entrypoint: []string{"/pause"},
	}

	img.Archive, err = Archive(img.Ref, goarch, files, img.Entrypoint, nil)

	return img, err
}

// programMode is the mode of the files in a layer.
const programMode = 0o755

// Archive is an image of one layer with executable files, as POST /images/load takes it on every
// engine: files by their path without leading slash, the entrypoint, and labels. It has no times,
// so equal input gives equal bytes.
func Archive(
	ref, goarch string, files map[string][]byte, entrypoint []string, labels map[string]string,
) ([]byte, error) {
	layer, err := pack(files, programMode)
	if err != nil {
		return nil, err
	}

	type object = map[string]any
	diff := sha256.Sum256(layer)
	config, err := json.Marshal(object{
		"architecture": goarch, "os": "linux", "created": "1970-01-01T00:00:00Z",
		"config": object{"Entrypoint": entrypoint, "Labels": labels, "WorkingDir": "/"},
		"rootfs": object{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(diff[:])}},
	})
	if err != nil {
		return nil, err
	}

	sum := sha256.Sum256(config)
	configName, layerName := hex.EncodeToString(sum[:])+".json", hex.EncodeToString(diff[:])+".tar"
	manifest, err := json.Marshal([]object{{
		"Config":   configName,
		"RepoTags": []string{ref},
		"Layers":   []string{layerName},
	}})
	if err != nil {
		return nil, err
	}

	return pack(map[string][]byte{configName: config, layerName: layer, "manifest.json": manifest}, 0o644)
}

// pack is a tar archive of the files, in order of their names.
func pack(files map[string][]byte, mode int64) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{
			Name:   name,
			Mode:   mode,
			Size:   int64(len(files[name])),
			Format: tar.FormatUSTAR,
		}); err != nil {
			return nil, err
		}

		if _, err := w.Write(files[name]); err != nil {
			return nil, err
		}
	}

	err := w.Close()

	return b.Bytes(), err
}
