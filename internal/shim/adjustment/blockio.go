package adjustment

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// EncodeBlockIO returns the parameters of a class of block I/O. The adjustments of a container have
// them instead of the name of the class, because only the daemon knows the classes.
func EncodeBlockIO(b *specs.LinuxBlockIO) (string, error) {
	out, err := json.Marshal(b)
	if err != nil {
		return "", fmt.Errorf("encode block I/O: %w", err)
	}
	return string(out), nil
}

// DecodeBlockIO undoes EncodeBlockIO.
func DecodeBlockIO(s string) (*specs.LinuxBlockIO, error) {
	b := &specs.LinuxBlockIO{}
	d := json.NewDecoder(bytes.NewReader([]byte(s)))
	d.DisallowUnknownFields()
	if err := d.Decode(b); err != nil {
		return nil, fmt.Errorf("decode block I/O: %w", err)
	}
	return b, nil
}
