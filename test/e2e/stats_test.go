package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"cri-dockerd/test/engines"
)

// summary is as much of the kubelet's Summary API (/stats/summary) as users read.
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

// missing names what a summary lacks, "" for nothing. Without the CRI's figures of pods the kubelet asks its own cAdvisor for their networks and
// processes, which knows none of Docker's.
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
		lacks = append(lacks, some(c.Name+": CPU", c.CPU.UsageCoreNanoSeconds), some(c.Name+": memory", c.Memory.WorkingSetBytes, c.Memory.RSSBytes),
			some(c.Name+": rootfs", c.Rootfs.InodesUsed, c.Rootfs.CapacityBytes, c.Rootfs.AvailableBytes), some(c.Name+": logs", c.Logs.CapacityBytes))
		if c.Logs.UsedBytes == nil || c.Name == "tick" && *c.Logs.UsedBytes == 0 { // the other one says nothing
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

// TestKubeletSummary asks the kubelet for its summary, with figures that it reads from the CRI alone and with those that it has from elsewhere too.
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
					return errors.New("the pod is not there: " + body)
				}
			}
			eventually(t, "the summary is complete", complete(false))
			k.engine.KillBackground(t, "kubelet")
			k.run(t, k.config+"featureGates: {PodAndContainerStatsFromCRI: true}\n")
			k.waitRunning(t, "web")
			eventually(t, "the summary is complete from the CRI alone", complete(true))
		})
	}
}
