package nri

import (
	"github.com/containerd/nri/plugins/default-validator/builtin"
)

// CheckValidator returns the error of a file for --nri-validator-config. root is a prefix of the
// path.
func CheckValidator(root, file string) error {
	_, err := readValidator(root, file)
	return err
}

// readValidator reads the configuration of NRI's default validator, nil without a file. root is a
// prefix of the path.
func readValidator(root, file string) (*builtin.DefaultValidatorConfig, error) {
	if file == "" {
		return nil, nil
	}

	cfg := &builtin.DefaultValidatorConfig{}
	if err := readYAML(root, file, cfg); err != nil {
		return nil, err
	}

	return cfg, nil
}
