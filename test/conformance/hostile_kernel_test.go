package conformance

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// victim is a pod whose metrics others try to spoil.
type victim struct{ pod, container string }

func (n *node) victim(t *testing.T) victim {
	t.Helper()
	cfg := n.podConfig(t)
	cfg.Linux.CgroupParent = n.cgroupRoot() + "/pod" + cfg.Metadata.Uid
	pod := n.runPod(t, cfg)
	return victim{pod, n.start(t, pod, cfg, sh("dd if=/dev/zero of=/dev/shm/x bs=1M count=48 2>/dev/null; sleep 1000"))}
}

// answers fails unless every list of metrics answers in time, has the victim, and is valid text.
func (v victim) answers(t *testing.T, n *node) {
	t.Helper()
	began := time.Now()
	stats, err := n.Runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	found := 0
	for _, s := range stats.Stats {
		if s.Attributes.Id == v.container && s.Memory.UsageBytes.GetValue() >= 48*mib {
			found++
		}
	}

	pods, err := n.Runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, s := range pods.Stats {
		if s.Attributes.Id == v.pod && s.Linux.Network.DefaultInterface.GetName() == "eth0" {
			found++
		}
	}

	if m := n.metrics(t, v.pod, v.container); m.one(t, "container_memory_usage_bytes") >= 48*mib {
		found++
	}
	if found != 3 {
		t.Errorf("the metrics of the other pod are in %d of 3 answers", found)
	}

	page := n.Metrics(t)
	if !utf8.ValidString(page) || !strings.Contains(page, `container_memory_usage_bytes{container="main"`) {
		t.Error("the page of metrics is not there, or is not valid text")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the answers took %v", took)
	}
}

// TestHostileLayer: a container makes a tree deeper than a path may be long, plants links, and
// swaps directories for links while its layer is measured. All of its files count, and nothing
// else.
func TestHostileLayer(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		cfg := n.podConfig(t)
		const levels = 3000
		chain := strings.Repeat("/d", 99) // each round puts 100 levels above what is there
		id := n.start(t, n.runPod(t, cfg), cfg, sh(fmt.Sprintf(`
			ln -s / /link; ln -s /proc/1/root /root-of-all; mkdir /swap; cd /swap
			for i in $(seq 50); do mkdir -p d$i/a/b; ln -s / l$i; done
			mkdir /deep; dd if=/dev/zero of=/deep/bottom bs=1M count=30 2>/dev/null; sync
			for i in $(seq %d); do mkdir -p /top%s; mv /deep /top%s/; mv /top /deep; done
			cd /swap
			while :; do for i in $(seq 50); do mv d$i x; mv l$i d$i; mv x l$i; mv d$i y; mv l$i d$i; mv y l$i; done; done`, levels/100, chain, chain)))

		var w *runtimeapi.FilesystemUsage
		counted := func() bool {
			w = n.stats(t, id).WritableLayer
			if w.GetUsedBytes().GetValue() > 60*mib || w.GetInodesUsed().GetValue() > levels+1000 {
				t.Fatalf("something outside of the layer was counted: %v", w)
			}
			return w.GetUsedBytes().GetValue() >= 30*mib && w.GetInodesUsed().GetValue() >= levels
		}
		if !within(90*time.Second, counted) {
			t.Fatalf("the deep tree was not counted: %v", w)
		}

		since := w.Timestamp
		measuredAgain := func() bool { return counted() && w.Timestamp > since+int64(20*time.Second) }
		if !within(90*time.Second, measuredAgain) {
			t.Errorf("the layer is not measured while its directories are swapped: %v", w)
		}

		v.answers(t, n)
		if w := n.stats(t, v.container).WritableLayer; w == nil || w.InodesUsed.GetValue() > 100 {
			t.Errorf("the layer of the other container: %v", w)
		}

		n.stop(t, id, 0)
	})
}

// TestHostileCgroup: a privileged container moves itself into another pod's control group, and into
// one that it has made there under its own name. Neither are that pod's metrics taken for its own,
// nor is that pod limited.
func TestHostileCgroup(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		score := n.exec(t, v.container, "cat", "/proc/1/oom_score_adj")
		for name, below := range map[string]string{
			"the other pod's":                        "",
			"one of its own name in the other pod's": "/$OWN",
		} {
			cfg := n.podConfig(t)
			cfg.Linux.SecurityContext.Privileged = true
			pod := n.runPod(t, cfg)
			cc := n.containerConfig(sh("until [ -e /go ]; do sleep 0.1; done; . /go; while :; do sleep 1; done"))
			cc.Linux.SecurityContext.Privileged = true
			cc.Mounts = []*runtimeapi.Mount{{HostPath: "/sys/fs/cgroup", ContainerPath: "/cg"}}
			id := n.startConfig(t, pod, cfg, cc)
			script := fmt.Sprintf(`OWN=%s; for g in $(find /cg -type d -name "*%s*"); do mkdir -p $g%s; echo $$ > `+
				`$g%s/cgroup.procs; done`,
				id, v.container, below, below)
			n.exec(t, id, "sh", "-c", "echo '"+script+"' > /new; mv /new /go")
			membership := ""
			eventually(t, "the process has moved", func() bool {
				membership = n.run(t, "cat", "/proc/"+n.inspect(t, id, ".State.Pid")+"/cgroup")
				return strings.Contains(membership, v.container)
			})

			r, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
			if err == nil && r.Stats.GetMemory().GetUsageBytes().GetValue() >= 40*mib {
				t.Errorf("in %s: metrics that are not its own: %v", name, r.Stats)
			}

			_, err = n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: id,
				Linux:       &runtimeapi.LinuxContainerResources{OomScoreAdj: 777},
			})
			if got := n.exec(t, v.container, "cat", "/proc/1/oom_score_adj"); got != score {
				t.Errorf("in %s: an update (%v) has set the other pod's score from %s to %s", name, err, score, got)
			}

			v.answers(t, n)
			n.removePod(t, pod)
		}

		v.answers(t, n)
	})
}

// TestHostileDevices: a pod has 2,000 network devices with names of any bytes. Its metrics have
// some of them, and those of other pods are there as ever.
func TestHostileDevices(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg, sh("sleep 1000"))
		var batch strings.Builder
		for i := range 2000 {
			prefix := []string{"\xff\xfe", "a\x1b[", "\xc3", `{}=,`, "\xe2\x80\xae"}[i%5]
			fmt.Fprintf(&batch, "link add name %s%d type bridge\n", prefix, i)
		}

		err := engines.In(n.own(t).NetNS(n.Pin(t, pod)), func() error {
			cmd := exec.Command("ip", "-force", "-batch", "-")
			cmd.Stdin = strings.NewReader(batch.String())
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %.200s", err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}

		s := n.podStats(t, pod).Network
		if len(s.Interfaces) < 2 || len(s.Interfaces) > 32 || s.DefaultInterface.GetName() != "eth0" {
			t.Errorf("%d interfaces, default %v", len(s.Interfaces), s.DefaultInterface)
		}

		odd := 0
		for _, i := range s.Interfaces {
			if strings.Contains(i.Name, `\x`) {
				odd++
			}
		}

		if odd == 0 {
			t.Errorf("no odd name among %v", s.Interfaces)
		}

		v.answers(t, n)
	})
}
