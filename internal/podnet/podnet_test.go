package podnet

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const (
	insideMark = "PODNET_TEST_INSIDE"
	pluginDir  = "/usr/lib/cni" // Debian's containernetworking-plugins
)

// TestMain runs the tests in separate mount and network namespaces, so that their bridges, rules
// and mounts do not affect the host.
func TestMain(m *testing.M) {
	if os.Getenv(insideMark) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), insideMark+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			os.Exit(exit.ExitCode())
		case err != nil:
			fmt.Fprintln(os.Stderr, "these tests need root:", err)
			os.Exit(1)
		}

		os.Exit(0)
	}

	if err := errors.Join(
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		os.MkdirAll("/var/lib/cni", 0o755),
		syscall.Mount("tmpfs", "/var/lib/cni", "tmpfs", 0, ""), // host-local's reservations
		loopbackUp("/proc/self/ns/net"),
	); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}

	goleak.VerifyTestMain(m)
}

var discard = slog.New(slog.DiscardHandler)

const sandboxID = "aaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccdddd"

// newPod returns a pod in its own network namespace, held by a sleeping process.
func newPod(t *testing.T, id string) (Pod, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	joinCgroup(t, model.ContainerID(id), cmd.Process.Pid)
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })

	return Pod{
		ID:        id,
		Name:      "web",
		Namespace: "default",
		UID:       "u",
		NetNS:     fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid),
	}, cmd
}

// joinCgroup moves a process to a control group with a container's ID, like an engine.
func joinCgroup(t *testing.T, id model.ContainerID, pid int) {
	t.Helper()
	root := "/sys/fs/cgroup/pids"
	if _, err := os.Stat(root); err != nil {
		root = "/sys/fs/cgroup" // cgroup v2
	}

	parent, err := os.MkdirTemp(root, "podnet-test-")
	if err != nil {
		t.Fatal(err)
	}

	dir := filepath.Join(parent, string(id))
	t.Cleanup(func() { // after the exit of the process
		if !within(func() bool { return errors.Join(os.Remove(dir), os.Remove(parent)) == nil }) {
			t.Errorf("control group %s remains", dir)
		}
	})

	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "cgroup.procs"),
		[]byte(fmt.Sprint(pid)), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func newKubenet(t *testing.T, dir string, cidrs ...string) *Kubenet {
	t.Helper()
	var ranges []netip.Prefix
	for _, c := range cidrs {
		ranges = append(ranges, netip.MustParsePrefix(c))
	}

	k, err := NewKubenet(KubenetConfig{
		BinDirs:  []string{pluginDir},
		CacheDir: filepath.Join(dir, "cache"),
		PodCIDRs: ranges,
		Hairpin:  HairpinVeth,
		Log:      discard,
	})
	if err != nil {
		t.Fatal(err)
	}

	return k
}

// del disconnects a pod. On a busy machine iptables may report a busy chain. The kubelet's next
// attempt would succeed.
func del(t *testing.T, n Connector, p Pod) {
	t.Helper()
	err := n.Del(t.Context(), p)
	for try := 1; err != nil && try < 5 && strings.Contains(err.Error(), "resource busy"); try++ {
		err = n.Del(t.Context(), p)
	}

	if err != nil {
		t.Error(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestKubenet(t *testing.T) {
	dir := t.TempDir()
	k := newKubenet(t, dir, "10.99.0.0/24", "fd00:99::/64")
	if err := k.Ready(); err != nil {
		t.Fatalf("%v", err)
	}

	p, cmd := newPod(t, sandboxID)
	p.Ports = []*runtimeapi.PortMapping{{HostPort: 18081, ContainerPort: 80}}
	ips, err := k.Add(t.Context(), p)
	if err != nil || len(ips) != 2 || !netip.MustParsePrefix("10.99.0.0/24").Contains(ips[0]) || !ips[1].Is6() {
		t.Fatalf("Add: %v, %v", ips, err)
	}

	if ips := newKubenet(t, dir, "10.98.0.0/24").IPs(p.ID); ips != nil {
		t.Errorf("addresses of an unconfirmed pod: %v", ips)
	}
	if err := k.Confirm(p.ID); err != nil {
		t.Error(err)
	}

	if out := run(t, "iptables-save"); !strings.Contains(out, "18081") {
		t.Errorf("no rule for the host port:\n%s", out)
	}

	run(t, "nsenter", "-n", "-t", fmt.Sprint(cmd.Process.Pid), "ip", "link", "show", "lo", "up")

	// Another process, with only the cache and with another range.
	restarted := newKubenet(t, dir, "10.98.0.0/24")
	if diff := cmp.Diff(fmt.Sprint(ips), fmt.Sprint(restarted.IPs(p.ID))); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
	if got := restarted.Attached(); len(got) != 1 || got[0] != p.ID {
		t.Errorf("attached: %v", got)
	}

	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	p.NetNS = ""
	for range 2 {
		del(t, restarted, p) // also without a namespace
	}

	if out := run(t, "iptables-save"); strings.Contains(out, "18081") {
		t.Errorf("rules remain:\n%s", out)
	}
	remaining, _ := filepath.Glob(filepath.Join(dir, "cache/results/*"))
	if len(remaining) > 0 || len(restarted.Attached()) > 0 {
		t.Errorf("files remain: %v, attached: %v", remaining, restarted.Attached())
	}
	if remaining, _ := filepath.Glob("/var/lib/cni/networks/kubenet/10.99.*"); len(remaining) > 0 {
		t.Errorf("reserved addresses remain: %v", remaining)
	}
}

// TestKubenetChangesItsRange changes the node's range under a running pod. The pod keeps its
// gateway, new pods get addresses of the new range, and a restarted daemon finds the same bridge.
func TestKubenetChangesItsRange(t *testing.T) {
	dir := t.TempDir()
	// in our own network namespace
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}

	k := newKubenet(t, dir, "10.96.0.0/24", "fd00:96::/64")
	old, _ := newPod(t, fmt.Sprintf("%064x", 1))
	if _, err := k.Add(t.Context(), old); err != nil {
		t.Fatal(err)
	}

	if err := k.SetPodCIDR([]netip.Prefix{netip.MustParsePrefix("10.95.0.0/24"),
		netip.MustParsePrefix("fd00:95::/64")}); err != nil {
		t.Fatal(err)
	}

	for i, k := range []*Kubenet{k, newKubenet(t, dir, "10.95.0.0/24", "fd00:95::/64")} {
		p, _ := newPod(t, fmt.Sprintf("%064x", 2+i))
		ips, err := k.Add(t.Context(), p)
		if err != nil || len(ips) != 2 || !netip.MustParsePrefix("10.95.0.0/24").Contains(ips[0]) {
			t.Fatalf("%v, %v", ips, err)
		}

		var l net.Listener
		if err := inNetNS(p.NetNS, func() (err error) {
			l, err = net.Listen("tcp4", ":8080")
			return err
		}); err != nil {
			t.Fatal(err)
		}

		for from, netns := range map[string]string{"the node": "", "the old pod": old.NetNS} {
			var f *os.File
			if netns != "" {
				if f, err = os.Open(netns); err != nil {
					t.Fatal(err)
				}
			}

			if c, err := Dial(t.Context(), f, netip.AddrPortFrom(ips[0], 8080)); err != nil {
				t.Errorf("from %s: %v", from, err)
			} else {
				c.Close()
			}

			f.Close()
		}

		l.Close()
		del(t, k, p)
	}

	del(t, k, old)
	if remaining, _ := filepath.Glob("/var/lib/cni/networks/kubenet/*.*.*.*"); len(remaining) > 0 {
		t.Errorf("reserved addresses remain: %v", remaining)
	}
}

func TestBridgeFor(t *testing.T) {
	ranges := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")}
	existing := map[string][]netip.Addr{"cbr0": {netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fe80::1")}}
	addresses := func(name string) ([]netip.Addr, error) { return existing[name], nil }
	for _, bridge := range []string{"cbr1", "cbr1"} {
		if got, err := bridgeFor(ranges, addresses); err != nil || got != bridge {
			t.Errorf("%s, %v, want %s", got, err, bridge)
		}
		existing["cbr1"] = []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00:1::1")}
	}

	everywhere := func(string) ([]netip.Addr, error) { return existing["cbr0"], nil }
	if _, err := bridgeFor(ranges, everywhere); err == nil || !strings.Contains(err.Error(), "ip link del cbr0") {
		t.Error(err)
	}
}

func TestKubenetWaitsForTheRange(t *testing.T) {
	k := newKubenet(t, t.TempDir())
	if err := k.Ready(); !errors.Is(err, errNoCIDR) {
		t.Errorf("Ready: %v", err)
	}

	if _, err := k.Add(t.Context(), Pod{}); !errors.Is(err, errNoCIDR) {
		t.Errorf("Add: %v", err)
	}

	if err := k.SetPodCIDR([]netip.Prefix{netip.MustParsePrefix("10.97.0.0/24")}); err != nil || k.Ready() != nil {
		t.Errorf("after SetPodCIDR: %v, %v", err, k.Ready())
	}

	k.cfg.BinDirs = []string{t.TempDir()}
	if err := k.Ready(); err == nil || !strings.Contains(err.Error(), `"bridge"`) ||
		!strings.Contains(err.Error(), "--cni-bin-dir") {
		t.Errorf("without plugins: %v", err)
	}
}

// TestTheFirstPodsAtOnce lets the race detector check lazy initialisation.
func TestTheFirstPodsAtOnce(t *testing.T) {
	c := newFake(t).network(t, "1.1.0")
	var wg sync.WaitGroup
	for i := range 8 {
		p, _ := newPod(t, fmt.Sprintf("%064x", i))
		wg.Go(func() {
			if _, err := c.Add(t.Context(), p); err != nil {
				t.Error(err)
			}
			if err := c.Collect(t.Context()); err != nil {
				t.Error(err)
			}
			del(t, c, p)
		})
	}

	wg.Wait()
}

func TestPluginParameters(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	if err := c.SetPodCIDR([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}); err != nil {
		t.Fatal(err)
	}

	p, _ := newPod(t, sandboxID)
	p.Ports = []*runtimeapi.PortMapping{{
		HostPort:      80,
		ContainerPort: 8080,
		Protocol:      runtimeapi.Protocol_UDP,
		HostIp:        "127.0.0.1",
	}, {ContainerPort: 1}}

	p.Annotations = map[string]string{ingressAnnotation: "10M", "k8s.v1.cni.cncf.io/networks": `[{"name":"a"}]`}
	p.DNS = &runtimeapi.DNSConfig{Servers: []string{"10.96.0.10"}}
	p.CgroupParent = "/kubepods/burstable/podu"
	if _, err := c.Add(t.Context(), p); err != nil {
		t.Fatal(err)
	}

	if want := "ADD " + sandboxID + " eth0 " + p.NetNS +
		" IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=" + sandboxID +
		";K8S_POD_UID=u\n"; !strings.Contains(f.calls(), want) {
		t.Errorf("calls: %s\nwant %s", f.calls(), want)
	}

	for _, want := range []string{
		`"portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"udp","hostIP":"127.0.0.1"}]`,
		`"ingressRate":10000000`, `"ipRanges":[[{"subnet":"10.1.0.0/16"}]]`, `"servers":["10.96.0.10"]`,
		`"cgroupPath":"/kubepods/burstable/podu"`,
		`"io.kubernetes.cri.pod-annotations":{"k8s.v1.cni.cncf.io/networks":"[{\"name\":\"a\"}]",` +
			`"kubernetes.io/ingress-bandwidth":"10M"}`,
	} {
		if stdin := f.read("stdin.ADD"); !strings.Contains(stdin, want) {
			t.Errorf("the plugin did not get %s:\n%s", want, stdin)
		}
	}
}

func TestConfigurationIsWatched(t *testing.T) {
	f := newFake(t)
	conf := filepath.Join(t.TempDir(), "cni", "net.d")
	c := newCNI(t, conf, f.dir, t.TempDir())
	if err := c.Ready(); err == nil || !strings.Contains(err.Error(), "install a network add-on") {
		t.Errorf("without a directory: %v", err)
	}

	waitFor := func(what string, cond func() bool) {
		t.Helper()
		deadline := time.Now().Add(5 * time.Second)
		begin := time.Now()
		for tick := time.NewTicker(time.Millisecond); !cond(); <-tick.C {
			if time.Now().After(deadline) {
				t.Fatalf("not within 5 s: %s (%v)", what, c.Ready())
			}
		}

		if d := time.Since(begin); d > time.Second {
			t.Errorf("%s took %v", what, d)
		}
	}
	if err := os.MkdirAll(conf, 0o755); err != nil {
		t.Fatal(err)
	}

	writeConf(t, filepath.Join(conf, "20-b.conflist"), "b", "1.0.0")
	waitFor("ready", func() bool { return c.Ready() == nil })
	p, _ := newPod(t, sandboxID)
	if _, err := c.Add(t.Context(), p); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(conf, "00-broken.conflist"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}

	writeConf(t, filepath.Join(conf, "10-a.conflist"), "a", "1.0.0")
	waitFor("the first valid file is used", func() bool { l, _, _ := c.config(); return l != nil && l.Name == "a" })
	for _, f := range []string{"00-broken", "10-a", "20-b"} {
		if err := os.Remove(filepath.Join(conf, f+".conflist")); err != nil {
			t.Fatal(err)
		}
	}

	waitFor("not ready", func() bool { return c.Ready() != nil })
	f.mode("")
	if err := c.Del(t.Context(), p); err != nil || !strings.Contains(f.calls(), "DEL") || len(c.Attached()) > 0 {
		t.Errorf("Del with a removed configuration: %v, calls %q", err, f.calls())
	}
}

func TestPins(t *testing.T) {
	pins, dir, _ := newPins(t)
	p, cmd := newPod(t, sandboxID)
	var want syscall.Stat_t
	if err := syscall.Stat(p.NetNS, &want); err != nil {
		t.Fatal(err)
	}

	for range 2 {
		path, err := pins.Pin(sandboxID, cmd.Process.Pid)
		if err != nil || path != pins.Path(sandboxID) || filepath.Dir(path) != dir || !isPinName(filepath.Base(path)) {
			t.Fatalf("%q, %v", path, err)
		}
	}

	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	var got syscall.Stat_t
	if err := syscall.Stat(pins.Path(sandboxID), &got); err != nil || got.Ino != want.Ino {
		t.Errorf("the pin is namespace %d, want %d (%v)", got.Ino, want.Ino, err)
	}

	if l := pins.List(); len(l) != 1 || l[0] != sandboxID {
		t.Errorf("list: %v", l)
	}

	for range 2 {
		if err := pins.Unpin(sandboxID); err != nil {
			t.Error(err)
		}
	}

	if pins.Path(sandboxID) != "" || len(pins.List()) != 0 {
		t.Error("still pinned")
	}
	if _, err := pins.Pin(sandboxID, 1<<22-1); err == nil || len(pins.List()) != 0 {
		t.Errorf("pin of a missing process: %v, list %v", err, pins.List())
	}

	if _, err := pins.Pin("", 1); err == nil {
		t.Error("pinned for an empty sandbox ID")
	}
}

// TestCreateRejectsSysctls creates namespaces with invalid sysctls, and leaves nothing behind.
func TestCreateRejectsSysctls(t *testing.T) {
	pins, _, dir := newPins(t)
	path, err := pins.Create(map[string]string{
		"net.ipv4.ip_local_port_range": "2000 3000",
		"net.ipv4.conf.lo/forwarding":  "",
	})
	if err == nil || !errdefs.IsInvalidArgument(err) {
		t.Errorf("invalid sysctl value: %q, %v", path, err)
	}

	for _, bad := range []string{"kernel.shmmax", "net/../kernel/shmmax", "net.no.such", "/net/core/somaxconn"} {
		if _, err := pins.Create(map[string]string{bad: "1"}); !errdefs.IsInvalidArgument(err) ||
			!strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}

	if remaining, err := os.ReadDir(dir); err == nil && len(remaining) > 0 {
		t.Errorf("leftovers of failures: %v", remaining)
	}
}

// TestPinsOfOurOwn creates a namespace before its sandbox and keeps it for the joining one.
func TestPinsOfOurOwn(t *testing.T) {
	pins, public, dir := newPins(t)
	before := run(t, "sysctl", "-n", "net.ipv4.ip_local_port_range")
	path, err := pins.Create(map[string]string{
		"net.ipv4.ip_local_port_range": "2000 3000",
		"net/ipv4/conf/lo/forwarding":  "1",
	})
	if err != nil {
		t.Fatal(err)
	}

	if got := run(t, "sysctl", "-n", "net.ipv4.ip_local_port_range"); got != before {
		t.Errorf("sysctl of the test's namespace changed to %s", got)
	}
	if len(pins.List()) != 0 || pins.Sweep() != nil {
		t.Error("a namespace without a sandbox is listed")
	}

	pin, err := pins.Keep(sandboxID, path)
	if err != nil || pin != pins.Path(sandboxID) {
		t.Fatalf("%q, %v", pin, err)
	}

	if err := pins.Drop(path); err != nil {
		t.Error(err)
	}

	if got := strings.Fields(run(t, "nsenter", "--net="+pin, "sysctl", "-n", "net.ipv4.ip_local_port_range",
		"net.ipv4.conf.lo.forwarding", "net.ipv4.ping_group_range",
		"net.ipv4.ip_unprivileged_port_start")); strings.Join(got, " ") != "2000 3000 1 0 2147483647 0" {
		t.Errorf("sysctls of the namespace: %v", got)
	}

	if out := run(t, "nsenter", "--net="+pin, "ip", "-o", "link", "show", "lo"); !strings.Contains(out, "LOOPBACK,UP") {
		t.Errorf("lo: %s", out)
	}

	joined := exec.Command("nsenter", "--net="+pin, "sleep", "1000")
	if err := joined.Start(); err != nil {
		t.Fatal(err)
	}

	joinCgroup(t, sandboxID, joined.Process.Pid)
	defer joined.Wait() //nolint:errcheck // killed
	defer joined.Process.Kill()

	if !within(func() bool {
		return pins.Joined(sandboxID, joined.Process.Pid)
	}) || pins.Joined(sandboxID, os.Getpid()) {
		t.Error("Joined does not distinguish processes inside and outside of the namespace")
	}

	if err := pins.Unpin(sandboxID); err != nil || pins.Joined(sandboxID, joined.Process.Pid) {
		t.Errorf("%v", err)
	}

	if _, err := pins.Create(nil); err != nil {
		t.Fatal(err)
	}

	if err := NewPins(public, dir).Sweep(); err != nil {
		t.Error(err)
	}

	if remaining, _ := os.ReadDir(dir); len(remaining) > 0 {
		t.Errorf("leftovers after Sweep of another process: %v", remaining)
	}
}

// TestSweepLinks removes the link of a process that was killed while it recorded a pin, but not
// that of this process.
func TestSweepLinks(t *testing.T) {
	dir := t.TempDir()
	pins := NewPins(t.TempDir(), dir)
	ours := pins.next + string(sandboxID)
	for _, link := range []string{newRecord + string(sandboxID), ours} {
		if err := os.Symlink("/run/netns/cni-x", filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}

	if err := pins.Sweep(); err != nil {
		t.Error(err)
	}

	links, err := os.ReadDir(dir)
	if err != nil || len(links) != 1 || links[0].Name() != ours {
		t.Errorf("links after Sweep: %v, %v; want only %s", links, err, ours)
	}
}

func TestBandwidth(t *testing.T) {
	got, err := bandwidth(map[string]string{ingressAnnotation: "100M", egressAnnotation: "64k"})
	want := map[string]int64{
		"ingressRate":  100e6,
		"ingressBurst": 10e6,
		"egressRate":   64e3,
		"egressBurst":  256 << 10 * 8,
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}

	if got, err := bandwidth(map[string]string{ingressAnnotation: "1P"}); err != nil ||
		got["ingressBurst"]/8 >= 1<<32-1 || got["ingressBurst"] <= 0 {
		t.Errorf("burst out of the plugin's range: %v, %v", got, err)
	}

	for _, bad := range []string{"", "much", "999", "2P", "-1M", "NaN", "Inf", "0x1p20", "1_000_000", "10M;", " 10M",
		"10M\n", "1e", strings.Repeat("9", 1<<20)} {
		t.Run(fmt.Sprintf("%.20q", bad), func(t *testing.T) {
			got, err := bandwidth(map[string]string{egressAnnotation: bad})
			if len(got) > 0 || err == nil || !strings.Contains(err.Error(), egressAnnotation) ||
				len(err.Error()) > 1000 {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

func TestNoop(t *testing.T) {
	var log strings.Builder
	n := NewNoop(slog.New(slog.NewTextHandler(&log, nil)))
	if !strings.Contains(log.String(), "--network-plugin=cni") || n.Connector() != nil || n.Ready() != nil {
		t.Errorf("log %q", log.String())
	}
}
