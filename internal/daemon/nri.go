package daemon

import (
	"context"
	"math"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"cri-dockerd/internal/cri"
	"cri-dockerd/internal/nri"
)

// adjustments returns the directory for the adjustments of NRI plugins, "" without plugins.
func (p *parts) adjustments() string {
	if p.cfg.NRISocket == "" {
		return ""
	}
	return p.cfg.Adjustments()
}

// openNRI opens the record of objects whose NRI plugins have completed, also of a former daemon,
// and creates the server of plugins.
func (p *parts) openNRI() (err error) {
	if p.nriStore, err = nri.OpenStore(p.cfg.Adjustments()); err != nil {
		return err
	}

	p.view.Conceal(p.nriStore.IsUnfinished)
	if p.cfg.NRISocket == "" {
		return nil
	}

	p.nri, err = nri.New(nri.Config{
		Socket:              p.cfg.NRISocket,
		PluginDir:           p.cfg.NRIPluginDir,
		ConfigDir:           p.cfg.NRIConfigDir,
		Validator:           p.cfg.NRIValidatorConfig,
		BlockIO:             p.cfg.NRIBlockIOConfig,
		RegistrationTimeout: p.cfg.NRIRegistrationTimeout,
		RequestTimeout:      p.cfg.NRIRequestTimeout,
		Version:             strings.TrimPrefix(p.version, "cri-dockerd "),
		Log:                 p.log,
	})
	if err != nil {
		return err
	}

	p.closeLater("NRI plugins", p.nri)

	return nil
}

// nriPlugins returns the plugins for the services of the CRI, nil for none.
func (p *parts) nriPlugins() cri.Plugins {
	if p.nri == nil {
		return nil
	}
	return p.nri
}

// nriCollectors returns the metrics of NRI plugins.
func (p *parts) nriCollectors() []prometheus.Collector {
	if p.nri == nil {
		return nil
	}
	return p.nri.Collectors()
}

// runPlugins runs NRI plugins, from the first complete view on. Until then, calls that concern
// plugins wait.
func (p *parts) runPlugins(ctx context.Context) error {
	if p.nri == nil {
		return nil
	}

	p.await(ctx, math.MaxInt64, nil, func() bool { return p.view.Engine().Ready })
	if ctx.Err() != nil {
		return nil
	}

	return cri.PluginRunner{Service: p.service}.Run(ctx, func(n nri.Node) error { return p.nri.Start(n) })
}
