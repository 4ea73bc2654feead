package finding

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/shell"
)

// healthy returns the facts of a cluster node without warnings or failures.
func healthy() *Facts {
	return &Facts{
		Root:    true,
		Systemd: true,
		Debian:  true,
		Flags: Flags{
			Source:        "cri-docker.service",
			Endpoint:      "unix:///var/run/cri-dockerd.sock",
			Socket:        "/var/run/cri-dockerd.sock",
			Docker:        "unix:///var/run/docker.sock",
			NetworkPlugin: "cni",
			CNIConfDir:    "/etc/cni/net.d",
			CNIBinDirs:    []string{"/opt/cni/bin", "/usr/lib/cni"},
			RunDirectory:  "/run/cri-dockerd",
			ContainerLog:  "auto",
			Command:       shell.Command("/usr/bin/cri-dockerd"),
		},
		Engine: Engine{
			Installed:     true,
			Version:       "29.1.0",
			API:           "1.52",
			CgroupDriver:  "systemd",
			StorageDriver: "overlayfs",
			RootDir:       "/var/lib/docker",
			LogDriver:     "json-file",
			LiveRestore:   true,
			MinOOMScore:   -1000,
			Config:        Config{File: "/etc/docker/daemon.json"},
		},
		Daemon: Daemon{
			Runtime:   "docker 29.1.0, CRI v1",
			Socket:    Socket{Exists: true, Mode: 0o660, Group: "docker"},
			Unit:      "cri-docker",
			Enabled:   true,
			Processes: []Process{{PID: 100, Program: "/usr/bin/cri-dockerd", Ours: true, Checked: true}},
			Conditions: []Condition{{"RuntimeReady", true, "", ""}, {"NetworkReady", true, "", ""},
				{"ContainerLogs", true, "CRIFiles", ""}, {"PodNetworkNamespaces", true, "CreatedByDaemon", ""}},
			Streaming: Streaming{Known: true, Addresses: []string{"127.0.0.1:40000"}},
		},
		Logs: LogDriver{Socket: "/run/docker/plugins/cri-dockerd.sock", PID: 99, Unit: true},
		CNI:  CNI{Files: []CNIFile{{File: "/etc/cni/net.d/10-flannel.conflist", Network: "cbr0"}}, Bridge: true},
		Kubelet: Kubelet{
			Present:    true,
			Version:    "v1.36.3",
			Minor:      36,
			ConfigFile: "/var/lib/kubelet/config.yaml",
			Kubeadm:    true,
			Joined:     true,
			Config: KubeletConfig{
				ContainerRuntimeEndpoint: "unix:///run/cri-dockerd.sock",
				CgroupDriver:             "systemd",
			},
		},
		Node: Node{
			Year:        2026,
			ClockKnown:  true,
			ClockSynced: true,
			IPForward:   "1",
			BridgeNF:    "1",
			Overlay:     true,
			DockerGroup: true,
			OtherCRI:    []string{"unix:///var/run/containerd/containerd.sock"},
			Disks: []Disk{{"/var/lib/docker", "imagefs", 100 << 30, 50 << 30, 1000, 500},
				{"/var/log/pods", "nodefs", 100 << 30, 50 << 30, 0, 0}},
			Directories: []Directory{{Path: "/run/cri-dockerd", Flag: "run-directory"}},
		},
	}
}

func TestHealthyNode(t *testing.T) {
	for _, f := range Evaluate(healthy()) {
		if f.Status != OK {
			t.Errorf("got %+v, want status ok", f)
		}
	}
}

// TestBrokenNodes compares the findings of every broken node with testdata/findings.txt: the cause
// comes first, followed by independent findings, each with its fix. UPDATE_GOLDEN=1 rewrites the
// file.
func TestBrokenNodes(t *testing.T) {
	var b strings.Builder
	seen := map[string]bool{}
	for _, c := range cases() {
		f := healthy()
		c.do(f)
		all := Evaluate(f)
		if all[0].ID != c.first || all[0].Status != Fail && all[0].Status != Warn {
			t.Errorf("%s: first finding is %+v, want %s", c.name, all[0], c.first)
		}

		seen[c.first] = true
		fmt.Fprintf(&b, "== %s\n", c.name)
		for _, x := range all {
			if (x.Status == Fail || x.Status == Warn) != (!x.Fix.IsZero()) {
				t.Errorf("%s: %+v: want a fix for failures and warnings only", c.name, x)
			}
			if err := x.Fix.Err(); err != nil {
				t.Errorf("%s: %s: %v", c.name, x.ID, err)
			}

			switch {
			case x.Cause != "":
				fmt.Fprintf(&b, "%s %s caused by %s\n", x.Status, x.ID, x.Cause)
			case !x.Fix.IsZero():
				fmt.Fprintf(&b, "%s %s: %s\n\t%s\n", x.Status, x.ID, x.Detail, x.Fix)
			}
		}
	}

	for _, r := range rules() {
		if !seen[r.id] {
			t.Errorf("no case for finding %s", r.id)
		}
	}

	const file = "testdata/findings.txt"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Error(diff)
	}
}

// TestRules checks the order of the rules: causes come first.
func TestRules(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rules() {
		for _, c := range r.causes {
			if !seen[c] {
				t.Errorf("cause %[2]s does not come before %[1]s", r.id, c)
			}
		}

		if seen[r.id] || r.title == "" {
			t.Errorf("%s: duplicate ID or empty title", r.id)
		}

		seen[r.id] = true
	}
}

// TestEveryFindingIsDocumented compares the findings with the headings of docs/check.md.
func TestEveryFindingIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../../docs/check.md")
	if err != nil {
		t.Fatal(err)
	}

	want := map[string]bool{"pod": true} // finding of the self-test
	for _, r := range rules() {
		want[r.id] = true
	}

	for _, m := range regexp.MustCompile("(?m)^### `([^`]+)`").FindAllStringSubmatch(string(b), -1) {
		if !want[m[1]] {
			t.Errorf("docs/check.md: section %s has no finding or is a duplicate", m[1])
		}
		delete(want, m[1])
	}

	for id := range want {
		t.Errorf("docs/check.md: no section for finding %s", id)
	}
}

func TestThreshold(t *testing.T) {
	f := healthy()
	f.Kubelet.Config.EvictionHard = map[string]string{
		"nodefs.available":   "1Gi",
		"imagefs.available":  "2.5%",
		"nodefs.inodesFree":  "100",
		"imagefs.inodesFree": "many",
	}

	for signal, want := range map[string]uint64{
		"nodefs.available":   1 << 30,
		"imagefs.available":  25,
		"nodefs.inodesFree":  100,
		"imagefs.inodesFree": 0,
		"other":              0,
	} {
		t.Run(signal, func(t *testing.T) {
			if _, got := f.threshold(signal, 1000); got != want {
				t.Errorf("got %d, want %d", got, want)
			}
		})
	}

	for value, want := range map[string]uint64{"1e9": 1e9, "1.5Gi": 3 << 29, "500m": 1, "-1Gi": 0, "1Pi": 1 << 50} {
		t.Run(value, func(t *testing.T) {
			f.Kubelet.Config.EvictionHard = map[string]string{"nodefs.available": value}
			if _, got := f.threshold("nodefs.available", 1000); got != want {
				t.Errorf("got %d, want %d", got, want)
			}
		})
	}
}

func TestUsesRuntimeDriver(t *testing.T) {
	gate := func(on bool) map[string]bool { return map[string]bool{"KubeletCgroupDriverFromCRI": on} }

	for _, c := range []struct {
		minor int
		gates map[string]bool
		flag  string
		want  bool
	}{
		{27, gate(true), "", false}, {28, nil, "", false}, {28, gate(true), "", true},
		{30, nil, "A=true,KubeletCgroupDriverFromCRI=true", true},
		{31, nil, "", true}, {31, gate(false), "", false}, {33, gate(true), "KubeletCgroupDriverFromCRI=false", false},
		{34, gate(false), "", true}, {0, nil, "", false},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			k := Kubelet{Minor: c.minor, Config: KubeletConfig{FeatureGates: c.gates}}
			if c.flag != "" {
				k.Flags = []Flag{{"feature-gates", c.flag, ""}}
			}
			if got := k.usesRuntimeDriver(); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestSameEndpoint(t *testing.T) {
	for _, a := range []string{"unix:///run/x.sock", "unix:///var/run/x.sock", "/var/run/x.sock", "/run/x.sock"} {
		if !isSameEndpoint(a, "unix:///var/run/x.sock") || isSameEndpoint(a, "unix:///run/y.sock") {
			t.Errorf("%s: want the same endpoint as x.sock and not as y.sock", a)
		}
	}
}
