package nri

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/nri/plugins/default-validator/builtin"
	"go.yaml.in/yaml/v3"

	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/safefs"
)

// maxValidatorConfig bounds the file of --nri-validator-config, in bytes.
const maxValidatorConfig = 64 << 10

// CheckValidator returns the error of a file for --nri-validator-config. root is a prefix of the
// path.
func CheckValidator(root, file string) error {
	_, err := readValidator(root, file)
	return err
}

// readValidator reads the configuration of NRI's default validator, nil without a file. Only root
// may be able to change the file. Unknown fields are errors: a misspelled rule would allow what the
// operator forbids. root is a prefix of the path.
func readValidator(root, file string) (*builtin.DefaultValidatorConfig, error) {
	if file == "" {
		return nil, nil
	}

	f, err := rootonly.Open(root, file)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	b, err := safefs.ReadAll(f, maxValidatorConfig)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}

	cfg := &builtin.DefaultValidatorConfig{}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)

	if err := d.Decode(cfg); errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: the file is empty", file)
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}

	if err := d.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one YAML document", file)
	}

	return cfg, nil
}
