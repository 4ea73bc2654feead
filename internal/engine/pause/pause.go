// Package pause provides the embedded pause image, so that pods start without a registry. The image
// archive, in the format of docker load, contains a program of a few hundred bytes. The source of
// the program is in src, and build compiles it for each architecture.
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

// Seccomp is a seccomp profile for the embedded image, in Docker's form. It allows the system calls
// of the program, and those of an OCI runtime between loading the profile and execve. All of them
// are allowed by Docker's default profile, too (setns with CAP_SYS_ADMIN), and the profile is for
// the native architecture alone. libseccomp compiles it in a tenth of the time of the default
// profile, which takes most of 10 ms at each start.
//
//go:embed seccomp.json
var Seccomp string

// Repository is the local name of the embedded image. Its tag is the hash of the program.
const Repository = "cri-dockerd.local/pause"

// Image is the embedded image for one architecture.
type Image struct {
	Ref        string // local name with tag
	Archive    []byte // for POST /images/load
	DiffID     string // digest of the only layer ("sha256:…"); identifies the content
	Entrypoint []string
}

// New returns the embedded image for an architecture, named as in Go ("amd64") or as by the engine
// ("x86_64"). Equal programs give equal bytes.
func New(arch string) (Image, error) {
	program, goarch := amd64, "amd64"
	switch arch {
	case "amd64", "x86_64":
	case "arm64", "aarch64":
		program, goarch = arm64, "arm64"
	default:
		return Image{}, fmt.Errorf("embedded pause image: architecture %q is not supported; set "+
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

// programMode is the file mode of the files in a layer.
const programMode = 0o755

// Archive returns an image for POST /images/load of every engine. The image has one layer of
// executable files; the keys of files are paths without a leading slash. The archive contains no
// timestamps, so equal input gives equal bytes.
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

// pack returns a tar archive of the files, sorted by name.
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
