// Package adjustment defines the files with which the daemon passes the adjustments of NRI plugins
// to the containerd shim. Docker gives a container its ID only at the creation, and plugins need
// it. So the daemon writes one file for each container after its creation, and the shim reads it at
// the start. See docs/adr/0012.
package adjustment

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/safefs"
)

const (
	// header is the first line of a file, with the version of the format.
	header = "cri-dockerd NRI adjustment 1\n"
	// maxSize bounds a file in bytes. It is the limit of a message of the NRI protocol.
	maxSize = 4 << 20
	// idLength is the length of a container ID of Docker, in characters.
	idLength = 64
)

// IsID reports whether a string is a container ID. It is the name of a file, too.
func IsID(s string) bool {
	if len(s) != idLength {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}

	return true
}

// Encode returns the content of a file. It returns an error for adjustments that Read rejects.
func Encode(a *api.ContainerAdjustment) ([]byte, error) {
	b, err := proto.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("encode the adjustments of NRI plugins: %w", err)
	}
	if len(header)+len(b) > maxSize {
		return nil, fmt.Errorf("the adjustments of NRI plugins have %d bytes, the maximum is %d", len(b),
			maxSize-len(header))
	}

	return append([]byte(header), b...), nil
}

// Decode parses the content of a file. The result is nil if plugins adjust nothing. It rejects
// other versions and unknown fields: a container must not start with less than the plugins want.
func Decode(b []byte) (*api.ContainerAdjustment, error) {
	text, ok := bytes.CutPrefix(b, []byte(header))
	if !ok {
		return nil, errors.New("its version is unknown")
	}
	if len(text) == 0 { // of most containers; the first use of a message type costs a new process much
		return nil, nil
	}

	a := &api.ContainerAdjustment{}
	if err := proto.Unmarshal(text, a); err != nil {
		return nil, err
	}
	if len(a.ProtoReflect().GetUnknown())+len(a.GetLinux().ProtoReflect().GetUnknown()) > 0 {
		return nil, errors.New("it has unknown fields")
	}

	return a, nil
}

// Read reads the adjustments of a container from a directory, nil for none. Only root may be able
// to change the file and the directories above. A missing file is an error: the plugins have not
// completed.
func Read(dir, id string) (*api.ContainerAdjustment, error) {
	if !IsID(id) {
		return nil, fmt.Errorf("%q is not a container ID", id)
	}

	f, err := rootonly.Open("", filepath.Join(dir, id))
	if err != nil {
		return nil, fmt.Errorf("adjustments of NRI plugins: %w", err)
	}
	defer f.Close()

	b, err := safefs.ReadAll(f, maxSize)
	if err != nil {
		return nil, fmt.Errorf("adjustments of NRI plugins: %w", err)
	}

	a, err := Decode(b)
	if err != nil {
		return nil, fmt.Errorf("adjustments of NRI plugins: %s: %w", f.Name(), err)
	}

	return a, nil
}
