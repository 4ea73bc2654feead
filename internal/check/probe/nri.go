package probe

import (
	"os"
	"path/filepath"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/nri"
)

// nri gathers the files of NRI plugins that keep the daemon from starting. Files that others can
// change are recorded for the finding file-owner.
func (p *Prober) nri(cfg *config.Config) (out finding.NRI) {
	if cfg.NRISocket == "" {
		return out
	}

	entries, _ := os.ReadDir(p.path(cfg.NRIPluginDir)) // it need not exist
	for _, e := range entries[:min(len(entries), maxFiles)] {
		info, err := e.Info()
		if err != nil || e.IsDir() {
			continue
		}

		file := filepath.Join(cfg.NRIPluginDir, e.Name())
		if f, err := p.open(file); err == nil {
			_ = f.Close()
		}
		if !nri.IsPluginName(e.Name(), info.Mode()) {
			out.Misnamed = append(out.Misnamed, file)
		}
	}

	if os.Geteuid() != 0 { // others may not be able to read them
		return out
	}
	if err := nri.CheckValidator(p.root, cfg.NRIValidatorConfig); err != nil {
		out.Validator = err.Error()
	}
	if err := nri.CheckBlockIO(p.root, cfg.NRIBlockIOConfig); err != nil {
		out.BlockIO = err.Error()
	}

	return out
}
