package probe

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
)

func TestNRIFiles(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "etc/nri/validator.yaml")
	err := errors.Join(os.MkdirAll(filepath.Join(root, "opt/nri/plugins/dir"), 0o755),
		os.MkdirAll(filepath.Dir(file), 0o755),
		os.WriteFile(filepath.Join(root, "opt/nri/plugins/10-good"), nil, 0o755),
		os.WriteFile(filepath.Join(root, "opt/nri/plugins/README"), nil, 0o644),
		os.WriteFile(filepath.Join(root, "opt/nri/plugins/logger"), nil, 0o755),
		os.WriteFile(file, []byte("enabled: true\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}

	p := &Prober{root: root}
	cfg := &config.Config{NRIPluginDir: "/opt/nri/plugins", NRIValidatorConfig: "/etc/nri/validator.yaml"}
	if got := p.nri(cfg); got.Misnamed != nil || got.Validator != "" {
		t.Errorf("NRI is off: %+v", got)
	}

	cfg.NRISocket = "/run/nri.sock"
	got := p.nri(cfg)
	if !strings.Contains(got.Validator, "enabled") {
		t.Errorf("error of the validator: %q", got.Validator)
	}

	got.Validator = ""
	if diff := cmp.Diff(finding.NRI{Misnamed: []string{"/opt/nri/plugins/logger"}}, got); diff != "" {
		t.Error(diff)
	}
}
