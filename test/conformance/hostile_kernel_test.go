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

// victim is a pod with metrics under attack by other pods.
type victim struct{ pod, container string }

func (n *node) victim(t *testing.T) victim {
	t.Helper()
	cfg := n.podConfig(t)
	cfg.Linux.CgroupParent = n.cgroupParent("pod" + cfg.Metadata.Uid)
	pod := n.runPod(t, cfg)
	id := n.start(t, pod, cfg, sh(`x=$(dd if=/dev/zero bs=1M count=48 2>/dev/null | tr '\0' x); `+
		`sleep 1000; echo "$x"`))
	eventually(t, "memory of the victim", func() bool {
		return n.stats(t, id).GetMemory().GetRssBytes().GetValue() >= 48*mib
	})

	return victim{pod, id}
}

// assertMetrics fails unless every list of metrics responds in time, has the victim, and is valid
// text.
func (v victim) assertMetrics(t *testing.T, n *node) {
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

	if m := n.metrics(t, v.pod, v.container); m.value(t, "container_memory_usage_bytes") >= 48*mib {
		found++
	}
	if found != 3 {
		t.Errorf("%d of 3 responses have the metrics of the victim", found)
	}

	page := n.Metrics(t)
	if !utf8.ValidString(page) || !strings.Contains(page, `container_memory_usage_bytes{container="main"`) {
		t.Error("the metrics page lacks the victim or is not valid UTF-8")
	}
	if took := time.Since(began); took > scaled(10*time.Second) {
		t.Errorf("the responses took %v", took)
	}
}

// TestHostileLayer runs a container that creates a tree deeper than the longest path, creates
// links, and swaps directories for links while its layer is measured. Exactly its own files are
// counted.
func TestHostileLayer(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		cfg := n.podConfig(t)
		const levels = 3000
		chain := strings.Repeat("/d", 99) // each round adds 100 levels at the top
		id := n.start(t, n.runPod(t, cfg), cfg, sh(fmt.Sprintf(`
			ln -s / /link; ln -s /proc/1/root /root-of-all; mkdir /swap; cd /swap
			for i in $(seq 50); do mkdir -p d$i/a/b; ln -s / l$i; done
			mkdir /deep; dd if=/dev/zero of=/deep/bottom bs=1M count=30 2>/dev/null; sync
			for i in $(seq %d); do mkdir -p /top%s; mv /deep /top%s/; mv /top /deep; done
			cd /swap
			while :; do for i in $(seq 50); do
			mv d$i x; mv l$i d$i; mv x l$i; mv d$i y; mv l$i d$i; mv y l$i
		done; done`, levels/100, chain, chain)))

		var w *runtimeapi.FilesystemUsage
		counted := func() bool {
			w = n.stats(t, id).WritableLayer
			if w.GetUsedBytes().GetValue() > 60*mib || w.GetInodesUsed().GetValue() > levels+1000 {
				t.Fatalf("files outside of the layer were counted: %v", w)
			}
			return w.GetUsedBytes().GetValue() >= 30*mib && w.GetInodesUsed().GetValue() >= levels
		}
		if !within(90*time.Second, counted) {
			t.Fatalf("the deep tree was not counted: %v", w)
		}

		since := w.Timestamp
		measuredAgain := func() bool { return counted() && w.Timestamp > since+int64(20*time.Second) }
		if !within(90*time.Second, measuredAgain) {
			t.Errorf("the layer was not measured again while its directories were swapped: %v", w)
		}

		v.assertMetrics(t, n)
		if w := n.stats(t, v.container).WritableLayer; w == nil || w.InodesUsed.GetValue() > 100 {
			t.Errorf("writable layer of the victim: %v", w)
		}

		n.stop(t, id, 0)
	})
}

// TestHostileCgroup runs a privileged container that moves itself into another pod's control group,
// and into one created there under its own name. It does not get the metrics of that pod, and its
// limits do not apply to that pod.
func TestHostileCgroup(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		score := n.exec(t, v.container, "cat", "/proc/1/oom_score_adj")
		for name, below := range map[string]string{
			"group of the victim": "",
			"child group":         "/$OWN",
		} {
			t.Run(name, func(t *testing.T) {
				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext.Privileged = true
				pod := n.runPod(t, cfg)
				cc := n.containerConfig(sh("until [ -e /go ]; do sleep 0.1; done; . /go; while :; do sleep 1; done"))
				cc.Linux.SecurityContext.Privileged = true
				cc.Mounts = []*runtimeapi.Mount{{HostPath: "/sys/fs/cgroup", ContainerPath: "/cg"}}
				id := n.startConfig(t, pod, cfg, cc)
				script := fmt.Sprintf(`OWN=%s; for g in $(find /cg -type d -name "*%s*"); do `+
					`mkdir -p $g%s; echo $$ > $g%s/cgroup.procs; done; touch /tried`, id, v.container, below, below)
				n.exec(t, id, "sh", "-c", "echo '"+script+"' > /new; mv /new /go")
				eventually(t, "attempt to move the process", func() bool {
					return n.exec(t, id, "sh", "-c", "ls /tried 2>/dev/null || true") != ""
				})
				groups := n.run(t, "cat", "/proc/"+n.inspect(t, id, ".State.Pid")+"/cgroup")
				// On cgroup v2 the container's own cgroup namespace prevents it (nsdelegate,
				// Documentation/admin-guide/cgroup-v2.rst).
				if moved := strings.Contains(groups, v.container); !moved && !n.hasV2(t) {
					t.Fatalf("the process has not moved: %s", groups)
				}

				r, err := n.Runtime.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
				if err == nil && r.Stats.GetMemory().GetRssBytes().GetValue() >= 40*mib {
					// not UsageBytes: the search of all groups takes memory of the kernel
					t.Errorf("metrics of another container: %v", r.Stats)
				}

				_, err = n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
					ContainerId: id,
					Linux:       &runtimeapi.LinuxContainerResources{OomScoreAdj: 777},
				})
				if got := n.exec(t, v.container, "cat", "/proc/1/oom_score_adj"); got != score {
					t.Errorf("an update (%v) has changed the victim's oom_score_adj from %s to %s", err, score, got)
				}

				v.assertMetrics(t, n)
				n.removePod(t, pod)
			})
		}

		v.assertMetrics(t, n)
	})
}

// TestHostileDevices creates 300 network devices with arbitrary names in a pod. Some of them are in
// its metrics. The metrics of other pods do not change. The kernel creates no network namespace
// while it removes them; 2,000 take 40 s on a busy machine.
func TestHostileDevices(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		v := n.victim(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg, sh("sleep 1000"))
		var batch strings.Builder
		for i := range 300 {
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
			t.Errorf("%d interfaces, default %v; want 2 to 32 and eth0", len(s.Interfaces), s.DefaultInterface)
		}

		escaped := 0
		for _, i := range s.Interfaces {
			if strings.Contains(i.Name, `\x`) {
				escaped++
			}
		}

		if escaped == 0 {
			t.Errorf("no escaped name in %v", s.Interfaces)
		}

		v.assertMetrics(t, n)
	})
}
