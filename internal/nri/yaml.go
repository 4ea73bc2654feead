package nri

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"

	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/safefs"
)

// maxYAML bounds a configuration file, in bytes.
const maxYAML = 64 << 10

// readYAML reads a configuration file. Only root may be able to change the file. Unknown fields are
// errors: a misspelled rule would allow what the operator forbids. root is a prefix of the path.
func readYAML(root, file string, to any) error {
	f, err := rootonly.Open(root, file)
	if err != nil {
		return err
	}
	defer f.Close()

	b, err := safefs.ReadAll(f, maxYAML)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}

	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)

	if err := d.Decode(to); errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: the file is empty", file)
	} else if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}

	if err := d.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: more than one YAML document", file)
	}

	return nil
}
