package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
)

// finding is a finding of check -o json.
type finding struct{ ID, Title, Status, Detail, Fix, Cause string }

// checkedNode is a node with injected faults, fixed with the commands suggested by check.
type checkedNode struct {
	command  func(name string, args ...string) *exec.Cmd // inside
	program  string
	baseline []string // warnings of this machine itself, such as its clock
}

// checkTimeout is the time after which a response is slow. The default suits an idle machine.
const checkTimeout = 4 * time.Second

// check runs `cri-dockerd check` inside the node and returns its findings in order. It fails if the
// exit code does not match the status.
func (p *checkedNode) check(t *testing.T, args ...string) []finding {
	t.Helper()
	args = append([]string{"check", "-o", "json", "--timeout=" + checkTimeout.String()}, args...)
	out, err := p.command(p.program, args...).Output()
	var doc struct {
		Status   string
		Findings []finding
	}

	if jsonErr := json.Unmarshal(out, &doc); jsonErr != nil {
		t.Fatalf("check: %v, %v\n%s", err, jsonErr, out)
	}

	code := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	}

	if want := map[string]int{"fail": 1, "warn": 0, "ok": 0}[doc.Status]; code != want {
		t.Fatalf("check exits with %d, its status is %s", code, doc.Status)
	}

	return doc.Findings
}

// problems returns the failures, and the warnings outside of the baseline, in order.
func (p *checkedNode) problems(t *testing.T, args ...string) []finding {
	t.Helper()
	return slices.DeleteFunc(p.check(t, args...), func(f finding) bool {
		return f.Status != "fail" && (f.Status != "warn" || slices.Contains(p.baseline, f.ID))
	})
}

// sh runs a shell command inside the node, as an operator would paste it.
func (p *checkedNode) sh(t *testing.T, line string) {
	t.Helper()
	if out, err := p.command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

const (
	kubeletYAML = "kind: KubeletConfiguration\ncgroupDriver: cgroupfs\nfailCgroupV1: false\nfailSwapOn: true\n" +
		"containerRuntimeEndpoint: unix://SOCKET\n"
	bridgeConf = `{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"bridge","bridge":"cni7","isGateway":true,` +
		`"ipMasq":true,` +
		`"ipam":{"type":"host-local","ranges":[[{"subnet":"10.97.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},` +
		`{"type":"portmap","capabilities":{"portMappings":true}}]}`
)

// newCheckedNode starts a healthy node: engine, daemon with its unit, network, and the files and
// the program of a kubelet.
func newCheckedNode(t *testing.T, n *node) *checkedNode {
	t.Helper()
	engines.ShareLimits(t)
	p := &checkedNode{command: n.eng.Command}
	files := map[string]string{
		// kubeadm records the selected runtime and configures the kubelet.
		"bin/kubeadm": "#!/bin/sh\n[ \"$1 $2\" = 'init --cri-socket' ] || exit 1\n" +
			"echo \"KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=$3\" > /var/lib/kubelet/kubeadm-flags.env\n",
		"10-test.conflist": bridgeConf,
		// The service of a node without systemd restarts the engine with its old command line.
		"docker.init": "#!/bin/sh\nexport PATH=DIR/bin:ENGINE:$PATH\nrm -f DIR/docker.sock /run/docker.pid\n" +
			"nohup xargs -0 -a DIR/docker.cmdline env >>DIR/docker.log 2>&1 &\necho $! > DIR/docker.pid\n",
	}

	for _, version := range []string{"v1.36.3", "v1.27.4"} {
		engines.BuildKubelet(t, filepath.Join(n.eng.Dir, "kubelet-"+version), version)
	}

	for name, content := range files {
		content = strings.NewReplacer("DIR", n.eng.Dir, "ENGINE", n.eng.Bin()).Replace(content)
		engines.WriteProgram(t, filepath.Join(n.eng.Dir, name), content)
	}

	p.sh(t, strings.ReplaceAll("cp DIR/kubelet-v1.36.3 DIR/bin/kubelet && "+
		"rm -rf /etc/kubernetes && mkdir -p /etc/cni/net.d /etc/sysctl.d && "+
		"cp DIR/10-test.conflist /etc/cni/net.d/ && "+
		"mkdir DIR/plugins && ln -s /usr/lib/cni/* DIR/plugins/ && "+
		"cp DIR/docker.init /etc/init.d/docker && "+
		"(grep -q ^docker: /etc/group || groupadd --system docker) && "+
		"[ -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || modprobe br_netfilter && "+
		"echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables", "DIR", n.eng.Dir))

	n.Daemon = n.eng.Daemon(t,
		"--network-plugin=cni",
		"--cni-conf-dir=/etc/cni/net.d",
		"--cni-bin-dir="+n.eng.Dir+"/plugins",
		"--pod-cidr=",
	)
	p.program = n.Program
	yaml := strings.ReplaceAll(kubeletYAML, "SOCKET", n.Socket)
	if err := os.WriteFile(filepath.Join(n.eng.Dir, "config.yaml"), []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}

	p.sh(t, "mkdir -p /var/lib/kubelet && cp "+n.eng.Dir+"/config.yaml /var/lib/kubelet/config.yaml && "+
		// The unit has the flags of the running daemon.
		"cp /proc/$(pidof cri-dockerd-running)/cmdline "+n.eng.Dir+"/daemon.cmdline && "+
		"(echo [Service]; printf ExecStart=; tr '\\0' ' ' < "+n.eng.Dir+"/daemon.cmdline; echo) "+
		"> /etc/systemd/system/cri-docker.service")

	p.recordBaseline(t)

	return p
}

// recordBaseline records the warnings that check reports on this machine. It fails if check reports
// a failure.
func (p *checkedNode) recordBaseline(t *testing.T) {
	t.Helper()
	for _, f := range p.check(t) {
		if f.Status == "fail" {
			t.Fatalf("check of a healthy node fails: %+v", f)
		}
		if f.Status == "warn" {
			p.baseline = append(p.baseline, f.ID)
		}
	}

	t.Logf("warnings of this machine: %v", p.baseline)
}

// fault is a way to break a node.
type fault struct {
	name         string
	id           string // of the expected first finding
	breakIt      string // shell commands
	status       string // fail or warn
	manual       bool   // the fix is not a command for a test: a package, an editor, a reboot
	restore      string // shell commands that undo the remains of the fault, or the whole fault if manual
	args         []string
	othersRemain bool // another initial fault remains
}

// hang returns a command that stops the process printed by another command and waits until all its
// threads have stopped.
func hang(pid string) string {
	return "p=$(" + pid + ") && kill -STOP $p && while grep -h ^State: /proc/$p/task/*/status | grep -qv T; do " +
		"sleep 0.1; done"
}

// kubeletConfig is the configuration file of the kubelet.
const kubeletConfig = "/var/lib/kubelet/config.yaml"

// nodeFaults returns faults in an order in which each leaves a healthy node.
func nodeFaults(n *node) []fault {
	return slices.Concat(
		networkFaults(n),
		kubeletFaults(n),
		daemonFaults(n),
		manualFaults(n),
		processFaults(n),
	)
}

// networkFaults returns faults of the kernel's network settings and of CNI.
func networkFaults(n *node) []fault {
	dir := n.eng.Dir

	return []fault{
		{
			name:    "no packets forwarded",
			id:      "ip-forward",
			status:  "fail",
			breakIt: "echo 0 > /proc/sys/net/ipv4/ip_forward",
		},
		{
			name:    "bridged packets bypass iptables",
			id:      "bridge-nf",
			status:  "fail",
			breakIt: "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables",
		},
		{
			name:    "no CNI",
			id:      "cni-config",
			status:  "fail",
			breakIt: "rm /etc/cni/net.d/*",
			restore: "rm /etc/cni/net.d/* && cp " + dir + "/10-test.conflist /etc/cni/net.d/",
		},
		{
			name:    "broken CNI JSON",
			id:      "cni-config",
			status:  "fail",
			breakIt: "sed -i 's/}]}$//' /etc/cni/net.d/10-test.conflist",
			restore: "rm /etc/cni/net.d/* && cp " + dir + "/10-test.conflist /etc/cni/net.d/",
		},
		{
			name:    "missing plugin",
			id:      "cni-plugins",
			status:  "fail",
			breakIt: "rm " + dir + "/plugins/host-local " + dir + "/plugins/bridge",
		},
	}
}

// kubeletFaults returns faults of the kubelet's flags and configuration.
func kubeletFaults(n *node) []fault {
	dir := n.eng.Dir
	kubelet := func(version string) string { return "cp " + dir + "/kubelet-" + version + " " + dir + "/bin/kubelet; " }

	return []fault{
		{
			name:   "removed kubelet flags",
			id:     "kubelet-flags",
			status: "fail",
			breakIt: `echo 'KUBELET_KUBEADM_ARGS="--network-plugin=cni --node-ip=192.0.2.1 ` +
				`--pod-infra-container-image=registry.example/pause:3.6"' > /var/lib/kubelet/kubeadm-flags.env`,
			restore: "grep -qx 'KUBELET_KUBEADM_ARGS=\" --node-ip=192.0.2.1\"' /var/lib/kubelet/kubeadm-flags.env && " +
				"rm /var/lib/kubelet/kubeadm-flags.env",
		},
		{
			name:   "kubelet on another endpoint, by flag",
			id:     "kubelet-endpoint",
			status: "fail",
			breakIt: `echo 'KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=` +
				`unix:///run/containerd/containerd.sock"' > /var/lib/kubelet/kubeadm-flags.env`,
			restore: "rm /var/lib/kubelet/kubeadm-flags.env",
		},
		{
			name:    "kubelet on another endpoint, by default",
			id:      "kubelet-endpoint",
			status:  "fail",
			breakIt: "sed -i /^containerRuntimeEndpoint/d " + kubeletConfig,
		},
		{
			name:    "wrong cgroup driver",
			id:      "cgroup-driver",
			status:  "fail",
			breakIt: kubelet("v1.27.4") + "sed -i 's/cgroupfs/systemd/' " + kubeletConfig,
			restore: kubelet("v1.36.3"),
		},
		{
			name:   "cgroup v1",
			id:     "cgroup-v1",
			status: "fail",
			breakIt: "grep -q cgroup2 /proc/mounts && ! [ -d /sys/fs/cgroup/memory ] && " +
				"mount -t tmpfs none /sys/fs/cgroup; sed -i /^failCgroupV1/d " + kubeletConfig,
			restore: "[ -d /sys/fs/cgroup/memory ] || umount /sys/fs/cgroup",
		},
		// Swap is shared by the whole machine, so the node sees a faked /proc/swaps.
		{
			name:   "swap",
			id:     "swap",
			status: "fail",
			breakIt: "printf 'Filename Type Size Used Priority\\n/swapfile file 1024 0 -2\\n' > /run/swaps && " +
				"mount --bind /run/swaps /proc/swaps",
			restore: "umount /proc/swaps; cp " + dir + "/config.yaml " + kubeletConfig,
		},
		{
			name:    "two CRI sockets",
			id:      "cri-sockets",
			status:  "warn",
			breakIt: "rm " + kubeletConfig,
			restore: "rm /var/lib/kubelet/kubeadm-flags.env; cp " + dir + "/config.yaml " + kubeletConfig,
		},
	}
}

// daemonFaults returns faults of the daemon's socket, directories and streaming address.
func daemonFaults(n *node) []fault {
	dir := n.eng.Dir

	return []fault{
		{name: "wrong socket mode", id: "daemon-socket", status: "warn", breakIt: "chmod 0666 " + n.Socket},
		{
			name:    "no group docker",
			id:      "docker-group",
			status:  "warn",
			breakIt: "cp /etc/group /run/group && sed -i /^docker:/d /etc/group && chown root:root " + n.Socket,
			restore: "cp /run/group /etc/group && chown root:docker " + n.Socket,
		},
		{
			name:    "read-only run directory",
			id:      "directories",
			status:  "fail",
			breakIt: "mount -t tmpfs -o ro none " + dir + "/run",
			restore: "umount " + dir + "/run",
		},
		{
			name:   "disk full",
			id:     "disk",
			status: "fail",
			breakIt: "mkdir -p /var/log/pods && mount -t tmpfs -o size=1m none /var/log/pods && " +
				"mkdir /var/log/pods/a && dd if=/dev/zero of=/var/log/pods/a/0.log.20260101-000000 bs=1k count=980",
			restore: "umount /var/log/pods",
		},
		{name: "no loopback", id: "streaming", status: "fail", breakIt: "ip link set lo down"},
		{
			name:   "two daemons",
			id:     "one-daemon",
			status: "fail",
			breakIt: "nohup " + n.Program + " --docker-endpoint=unix://" + n.eng.Socket +
				" --container-runtime-endpoint=unix:///run/second.sock --network-plugin= " +
				"--cri-dockerd-root-directory=/run/second/lib --run-directory=/run/second/run " +
				"--metrics-bind-address= >/run/second.log 2>&1 & until [ -S /run/second.sock ]; do sleep 0.1; done",
		},
	}
}

// manualFaults returns faults with a fix by hand.
func manualFaults(n *node) []fault {
	dir := n.eng.Dir

	return []fault{
		{
			name:    "broken daemon.json",
			id:      "engine-config",
			status:  "warn",
			manual:  true,
			breakIt: "echo '{' > /etc/docker/daemon.json",
			restore: "rm /etc/docker/daemon.json",
		},
		{
			name:    "broken kubelet configuration",
			id:      "kubelet-config",
			status:  "fail",
			manual:  true,
			breakIt: "echo '[' >> " + kubeletConfig,
			restore: "cp " + dir + "/config.yaml " + kubeletConfig,
		},
		{
			name:   "engine too old",
			id:     "engine-version",
			status: "fail",
			manual: true,
			args:   []string{"--docker-endpoint=unix://" + dir + "/old.sock"},
		},
		{
			name:   "engine slow",
			id:     "engine",
			status: "warn",
			manual: true,
			args:   []string{"--docker-endpoint=unix://" + dir + "/slow.sock"},
		},
		{
			name:   "engine hangs",
			id:     "engine",
			status: "fail",
			manual: true,
			args:   []string{"--docker-endpoint=unix://" + dir + "/hung.sock"},
		},
		{
			name:   "sandbox image out of reach",
			id:     "pause-image",
			status: "fail",
			manual: true,
			args:   []string{"--pod-infra-container-image=127.0.0.1:1/pause:3.6"},
		},
	}
}

// processFaults returns stopped and hanging processes. The order matters: the last fixes start the
// processes again.
func processFaults(n *node) []fault {
	dir := n.eng.Dir

	return []fault{
		{
			name:    "log-driver hangs",
			id:      "log-driver",
			status:  "fail",
			breakIt: hang("pgrep -f '[l]og-driver --run-directory=" + dir + "/run'"),
		},
		{
			name:    "daemon down",
			id:      "daemon",
			status:  "fail",
			breakIt: "kill -KILL $(pidof cri-dockerd-running) && while pidof cri-dockerd-running; do sleep 0.1; done",
		},
		// The target is the daemon started by the previous fix. Stopping a child of the test
		// harness would stop the harness.
		{name: "daemon hangs", id: "daemon", status: "fail", breakIt: hang("pidof cri-dockerd")},
		{
			name:   "engine down",
			id:     "engine",
			status: "fail",
			breakIt: "cp /proc/$(cat " + dir + "/docker.pid)/cmdline " + dir + "/docker.cmdline && kill -TERM $(cat " +
				dir + "/docker.pid) && while [ -e /proc/$(cat " + dir + "/docker.pid) ]; do sleep 0.1; done",
		},
	}
}

// TestBrokenNodes breaks a node in many ways. check reports the cause first, and its fix works.
func TestBrokenNodes(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := newCheckedNode(t, n)
		p.listen(t, n)
		for _, f := range nodeFaults(n) {
			p.breakAndFix(t, f)
		}

		began := time.Now()
		p.sh(t, p.program+" check")
		t.Logf("check of a healthy node: %s", time.Since(began).Round(time.Millisecond))
	})
}

// listen serves the sockets of the faults: an engine of 2019, a slow and a hanging one, and another
// CRI server. (Docker would use a containerd socket itself.)
func (p *checkedNode) listen(t *testing.T, n *node) {
	t.Helper()
	p.sh(t, "mkdir -p /run/crio")

	for path, handler := range map[string]http.Handler{
		filepath.Join(n.eng.Dir, "old.sock"):  http.HandlerFunc(oldEngine),
		filepath.Join(n.eng.Dir, "slow.sock"): http.HandlerFunc(slowEngine),
		filepath.Join(n.eng.Dir, "hung.sock"): http.HandlerFunc(hungEngine),
		n.eng.Path("/run/crio/crio.sock"):     http.NotFoundHandler(),
	} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
		go s.Serve(l) //nolint:errcheck // ends with the test
		t.Cleanup(func() { s.Close() })
	}
}

// oldEngine responds like Docker 19.03.
func oldEngine(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.40")
	w.Header().Set("Content-Type", "application/json")
	if strings.HasSuffix(r.URL.Path, "/info") {
		fmt.Fprint(w, `{"ServerVersion":"19.03.15","OSType":"linux","Driver":"overlay2","CgroupDriver":"cgroupfs",`+
			`"LiveRestoreEnabled":true}`)
		return
	}

	fmt.Fprint(w, "OK")
}

// slowEngine responds after check's timeout.
func slowEngine(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.47")
	w.Header().Set("Content-Type", "application/json")
	if strings.HasSuffix(r.URL.Path, "/info") {
		time.Sleep(checkTimeout + time.Second)
		fmt.Fprint(w, `{"ServerVersion":"27.0.1","OSType":"linux","Driver":"overlay2","CgroupDriver":"cgroupfs",`+
			`"LiveRestoreEnabled":true}`)
	}
}

// hungEngine accepts requests and never responds.
func hungEngine(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// breakAndFix injects a fault, checks that check finds it, runs the suggested fix and checks that
// the finding disappears.
func (p *checkedNode) breakAndFix(t *testing.T, f fault) {
	t.Helper()
	began := time.Now()
	defer func() { t.Logf("%s: %s", f.name, time.Since(began).Round(time.Millisecond)) }()

	if f.breakIt != "" {
		p.sh(t, f.breakIt)
	}

	all := p.problems(t, f.args...)
	if len(all) == 0 || all[0].ID != f.id || all[0].Status != f.status {
		t.Fatalf("%s: findings %+v, want %s %s first", f.name, all, f.status, f.id)
	}

	t.Logf("%s: %s\n\t%s", all[0].ID, all[0].Detail, all[0].Fix)
	if !f.manual {
		p.sh(t, all[0].Fix)
		var found []finding
		if !within(20*time.Second, func() bool {
			found = p.problems(t)
			return !hasFinding(found, f.id, "fail", "warn")
		}) {
			t.Fatalf("%s: after the fix check still finds %+v", f.name, found)
		}
	}

	if f.restore != "" {
		p.sh(t, f.restore)
	}
	if f.othersRemain {
		return
	}

	var found []finding
	if !within(20*time.Second, func() bool { found = p.problems(t); return len(found) == 0 }) {
		t.Fatalf("%s: the node does not become healthy, check finds %+v", f.name, found)
	}
}

// hasFinding reports whether a finding has one of the given statuses.
func hasFinding(all []finding, id string, status ...string) bool {
	return slices.ContainsFunc(all, func(f finding) bool { return f.ID == id && slices.Contains(status, f.Status) })
}
