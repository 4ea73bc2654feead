package daemon

import (
	"runtime/debug"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// figures is the registry of all that the daemon tells about itself: what each part counts where it arises, and the process.
func figures(version string, parts ...prometheus.Collector) (*prometheus.Registry, error) {
	r := prometheus.NewRegistry()
	for _, c := range append(parts, buildInfo(version), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})) {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// buildInfo is a 1 with the labels of this program.
func buildInfo(version string) prometheus.Collector {
	labels := prometheus.Labels{"version": strings.TrimPrefix(version, "cri-dockerd "), "goversion": ""}
	if b, ok := debug.ReadBuildInfo(); ok {
		labels["goversion"] = b.GoVersion
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "cri_dockerd_build_info", Help: "Always 1; the labels say which program this is.", ConstLabels: labels})
	g.Set(1)
	return g
}

// collectors are the figures of the parts. A part that has some is added here.
func (p *parts) collectors() []prometheus.Collector {
	return slices.Concat(p.engine.Collectors(), p.server.Collectors(), p.plugins.Collectors())
}
