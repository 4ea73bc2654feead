package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"testing"

	"cri-dockerd/test/engines"
)

// summary is the commonly used part of the kubelet's Summary API (/stats/summary).
type summary struct {
	Pods []podSummary
}

type podSummary struct {
	PodRef  struct{ Name string }
	CPU     cpuSummary
	Memory  memorySummary
	Network *struct {
		Name             string
		RxBytes, TxBytes uint64
	}
	Containers []containerSummary
	Processes  *struct {
		Count uint64 `json:"process_count"`
	} `json:"process_stats"`
}

type containerSummary struct {
	Name         string
	CPU          cpuSummary
	Memory       memorySummary
	Rootfs, Logs fsSummary
}

type cpuSummary struct{ UsageNanoCores, UsageCoreNanoSeconds *uint64 }
type memorySummary struct{ UsageBytes, WorkingSetBytes, RSSBytes *uint64 }
type fsSummary struct{ UsedBytes, InodesUsed, CapacityBytes, AvailableBytes *uint64 }

// missing returns the first missing value of a summary, or "". Without pod statistics of the CRI,
// the kubelet reads networks and processes from its own cAdvisor, which has none for Docker.
func (p podSummary) missing(fromCRI bool) string {
	some := func(what string, values ...*uint64) string {
		for _, v := range values {
			if v == nil || *v == 0 {
				return what
			}
		}
		return ""
	}

	lacks := []string{
		some("the pod's CPU", p.CPU.UsageCoreNanoSeconds), some("the pod's memory", p.Memory.WorkingSetBytes),
	}
	if fromCRI && (p.Network == nil || p.Network.Name != "eth0" || p.Network.RxBytes == 0) {
		lacks = append(lacks, "network")
	}
	if fromCRI && (p.Processes == nil || p.Processes.Count < 3) {
		lacks = append(lacks, "processes")
	}

	for _, c := range p.Containers {
		lacks = append(lacks, some(c.Name+": CPU", c.CPU.UsageCoreNanoSeconds),
			some(c.Name+": memory", c.Memory.WorkingSetBytes, c.Memory.RSSBytes),
			some(c.Name+": rootfs", c.Rootfs.InodesUsed, c.Rootfs.CapacityBytes, c.Rootfs.AvailableBytes),
			some(c.Name+": logs", c.Logs.CapacityBytes))
		if c.Logs.UsedBytes == nil || c.Name == "tick" && *c.Logs.UsedBytes == 0 { // the other container prints nothing
			lacks = append(lacks, c.Name+": bytes of logs")
		}
	}

	if len(p.Containers) != 2 {
		lacks = append(lacks, fmt.Sprintf("%d containers", len(p.Containers)))
	}

	for _, l := range lacks {
		if l != "" {
			return l
		}
	}

	return ""
}

// TestKubeletSummary checks the kubelet's summary, first with statistics from several sources and
// then from the CRI only.
func TestKubeletSummary(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := startKubelet(t, v)
			k.apply(t, "web", webPod)
			k.waitRunning(t, "web")
			complete := func(fromCRI bool) func() error {
				return func() error {
					body, err := k.get("/stats/summary")
					if err != nil {
						return err
					}

					var s summary
					if err := json.Unmarshal([]byte(body), &s); err != nil {
						return err
					}

					for _, p := range s.Pods {
						if p.PodRef.Name == "web-node" {
							if m := p.missing(fromCRI); m != "" {
								return fmt.Errorf("no %s", m)
							}
							return nil
						}
					}

					return errors.New("the pod is missing: " + body)
				}
			}

			eventually(t, "the summary is complete", complete(false))
			k.engine.KillBackground(t, "kubelet")
			k.run(t, k.config+"featureGates: {PodAndContainerStatsFromCRI: true}\n")
			k.waitRunning(t, "web")
			eventually(t, "the summary is complete from the CRI alone", complete(true))
			eventually(t, "the kubelet's metrics have those of the CRI", func() error {
				return k.hasMetrics("web-node", "web", "tick")
			})
		})
	}
}

// hasMetrics returns an error for metrics missing from the kubelet's /metrics/cadvisor of a pod
// with these containers, when the CRI provides them.
func (k *kubelet) hasMetrics(pod string, containers ...string) error {
	page, err := k.get("/metrics/cadvisor")
	if err != nil {
		return err
	}

	// has checks that a series with these labels and value exists.
	has := func(name, container, value string) error {
		series := regexp.MustCompile(`(?m)^` + name + `{container="` + container +
			`",[^\n]*id="/[^\n]*namespace="default",[^\n]*pod="` + pod + `"[^\n]*} ` + value)
		if !series.MatchString(page) {
			return fmt.Errorf("no %s of container %q", name, container)
		}
		return nil
	}

	const some, any = `[1-9]`, `[0-9]`
	var lacks []error
	for _, c := range containers {
		for name, value := range map[string]string{
			"container_cpu_usage_seconds_total": any, "container_cpu_user_seconds_total": any,
			"container_memory_working_set_bytes": some, "container_memory_rss": some,
			"container_memory_failures_total": some, "container_fs_usage_bytes": any, "container_fs_limit_bytes": some,
			"container_processes": some, "container_threads": some,
			"container_file_descriptors": some, "container_sockets": any, "container_ulimits_soft": some,
			"container_oom_events_total": "0", "container_start_time_seconds": some,
			"container_last_seen": some, "container_spec_cpu_period": some, "container_spec_cpu_shares": some,
			"container_spec_memory_limit_bytes": any,
		} {
			lacks = append(lacks, has(name, c, value))
		}
	}

	return errors.Join(append(lacks,
		has("container_network_receive_bytes_total", "POD", some),
		has("container_network_transmit_packets_total", "POD", some),
		has("container_memory_working_set_bytes", "", some), has("container_cpu_usage_seconds_total", "", any),
		has("container_threads", "", some),
	)...)
}
