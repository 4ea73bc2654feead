package probe

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/rootonly"
)

// tree returns a Prober for a root directory with these files.
func tree(t *testing.T, files map[string]string) *Prober {
	t.Helper()
	root := t.TempDir()
	all := map[string]string{
		"/proc/self/ns/user": "user:[1]",
		"/proc/self/ns/pid":  "pid:[1]",
		"/proc/self/ns/mnt":  "mnt:[1]",
	}

	for name, content := range files {
		if pid, isArgs := strings.CutSuffix(name, "/cmdline"); isArgs { // a process of root on this host
			all[pid+"/status"] = "Uid:\t0\t0\t0\t0\n"
			all[pid+"/stat"] = "5 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 500\n"
			all[pid+"/exe"], _, _ = strings.Cut(content, "\x00")
			all[pid+"/ns/user"], all[pid+"/ns/pid"], all[pid+"/ns/mnt"] = "user:[1]", "pid:[1]", "mnt:[1]"
		}
	}

	maps.Copy(all, files)
	for name, content := range all {
		file := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		switch {
		case err != nil:
		case strings.HasPrefix(name, "/proc/") && (strings.Contains(name, "/ns/") || strings.HasSuffix(name, "/exe")):
			err = os.Symlink(content, file)
		default:
			err = os.WriteFile(file, []byte(content), 0o644)
		}

		if err != nil {
			t.Fatal(err)
		}
	}

	return &Prober{root: root, proc: proc.At(root + "/proc"), timeout: Timeout}
}

// flagsOf returns the daemon's flags parsed from a command line.
func flagsOf(t *testing.T, args ...string) (*config.Config, *pflag.FlagSet) {
	t.Helper()
	cfg, f := &config.Config{}, pflag.NewFlagSet("check", pflag.ContinueOnError)
	cfg.Register(f)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return cfg, f
}

// minikube has the files of a minikube node: a drop-in overrides the package's unit.
var minikube = map[string]string{
	"/usr/lib/systemd/system/cri-docker.service": "[Service]\nEnvironmentFile=-/etc/default/cri-docker\n" +
		"ExecStart=/usr/bin/cri-dockerd --container-runtime-endpoint fd:// $CRI_DOCKERD_OPTS\n",
	"/etc/systemd/system/cri-docker.service.d/10-cni.conf": "[Service]\nExecStart=\nExecStart=/usr/bin/cri-dockerd " +
		"--container-runtime-endpoint fd:// \\\n" +
		"  --pod-infra-container-image=registry.example/pause:3.10 --network-plugin=cni --hairpin-mode=hairpin-veth " +
		"--cni-bin-dir=/a,/b\n",
	"/usr/lib/systemd/system/cri-docker.socket":                      "[Socket]\nListenStream=%t/other.sock\n",
	"/etc/systemd/system/multi-user.target.wants/cri-docker.service": "",
}

func TestAdoptUnit(t *testing.T) {
	p := tree(t, minikube)
	cfg, f := flagsOf(t, "--hairpin-mode=none")
	a := p.Adopt(t.Context(), cfg, f)
	if cfg.PauseImage != "registry.example/pause:3.10" || cfg.HairpinMode != "none" || cfg.Endpoint != "fd://" ||
		cmp.Diff([]string{"/a", "/b"}, cfg.CNIBinDirs) != "" {
		t.Errorf("configuration %+v", cfg)
	}

	if a.Unit != "cri-docker" || a.Endpoint != "unix:///run/other.sock" || a.Mistake.Error != "" || !a.Given ||
		a.Files["pod-infra-container-image"] != "/etc/systemd/system/cri-docker.service.d/10-cni.conf" {
		t.Errorf("%+v", a)
	}

	if !strings.Contains(a.Command.String(),
		" --cni-bin-dir=/a,/b --container-runtime-endpoint=unix:///run/other.sock --hairpin-mode=none ") {
		t.Errorf("command %q", a.Command)
	}
}

func TestAdoptDefaults(t *testing.T) {
	cfg, f := flagsOf(t)
	a := tree(t, nil).Adopt(t.Context(), cfg, f)
	if a.Source != "the defaults" || a.Given || a.Endpoint != cfg.Endpoint ||
		cfg.Endpoint != "unix:///var/run/cri-dockerd.sock" {
		t.Errorf("%+v", a)
	}
}

func TestAdoptRunningDaemon(t *testing.T) {
	files := map[string]string{
		"/proc/78/ns/pid": "pid:[2]", "/proc/80/status": "Uid:\t1000\t1000\t1000\t1000\n",
		"/proc/80/cmdline": "/usr/bin/cri-dockerd\x00--cni-conf-dir=/of/a/user\x00",
		"/proc/77/cmdline": "/usr/bin/cri-dockerd\x00--cni-conf-dir\x00/x/net.d\x00--of-another-release=1\x00" +
			"--ipv6-dual-stack=True\x00",
		"/proc/78/cmdline": "/usr/bin/cri-dockerd\x00--cni-conf-dir=/in/a/container\x00",
		"/proc/79/cmdline": "/usr/bin/cri-dockerd\x00log-driver\x00",
	}

	for name, content := range minikube {
		files[name] = content
	}

	p := tree(t, files)
	cfg, f := flagsOf(t)
	a := p.Adopt(t.Context(), cfg, f)
	if cfg.CNIConfDir != "/x/net.d" || !cfg.IPv6DualStack || cfg.PauseImage != "" ||
		a.Source != "the running daemon (process 77)" {
		t.Errorf("%+v %+v", a, cfg)
	}

	if all := p.daemons(); len(all) != 1 {
		t.Errorf("%+v", all)
	}
}

func TestAdoptMistake(t *testing.T) {
	p := tree(t, map[string]string{
		"/lib/systemd/system/cri-dockerd.service": "[Service]\nEnvironment=\"A=--network-plugn=cni " +
			"--cni-conf-dir=/y\"\nExecStart=/usr/local/bin/cri-dockerd ${A}\n",
	})

	cfg, f := flagsOf(t)
	a := p.Adopt(t.Context(), cfg, f)
	want := finding.Mistake{
		Error:   "unknown flag: --network-plugn",
		Flag:    "network-plugn",
		File:    "/lib/systemd/system/cri-dockerd.service",
		Nearest: "network-plugin",
	}
	if diff := cmp.Diff(want, a.Mistake); diff != "" || a.Unit != "cri-dockerd" || cfg.CNIConfDir != "/y" {
		t.Errorf("%+v %s", a, diff)
	}
}

func TestIsEnabled(t *testing.T) {
	p := tree(t, minikube)
	if !p.isEnabled("cri-docker.service") || p.isEnabled("cri-docker.socket") {
		t.Error("want an enabled service and a disabled socket")
	}
}

const kubeadmUnit = `[Service]
Environment="KUBELET_KUBECONFIG_ARGS=--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf"
Environment="KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml"
Environment="UNUSED=--network-plugin=kubenet"
# EnvironmentFile=-/nothing
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
EnvironmentFile=-/etc/default/kubelet
ExecStart=
ExecStart=/usr/bin/kubelet $KUBELET_KUBECONFIG_ARGS $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
`

func TestKubeletFromKubeadm(t *testing.T) {
	p := tree(t, map[string]string{
		"/usr/lib/systemd/system/kubelet.service":                   "[Service]\nExecStart=/usr/bin/kubelet\n",
		"/usr/bin/README":                                           "",
		"/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf": kubeadmUnit,
		"/var/lib/kubelet/kubeadm-flags.env": `KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=` +
			`unix:///run/containerd/containerd.sock --network-plugin cni"` + "\n",
		"/etc/default/kubelet": "KUBELET_EXTRA_ARGS=--fail-swap-on\n",
		"/var/lib/kubelet/config.yaml": "kind: KubeletConfiguration\ncgroupDriver: " +
			"systemd\nfailSwapOn: false\nfeatureGates: {A: true}\nevictionHard: {nodefs.available: 5%}\n" +
			"authentication: {anonymous: {enabled: false}}\n",
		"/etc/kubernetes/kubelet.conf": "",
	})

	buildKubelet(t, p.path("/usr/bin/kubelet"), kubeletModule, "-ldflags",
		"-X k8s.io/component-base/version.gitVersion=v1.31.4")
	k := p.kubelet(t.Context())
	env := "/var/lib/kubelet/kubeadm-flags.env"
	want := []finding.Flag{
		{
			Name:  "bootstrap-kubeconfig",
			Value: "/etc/kubernetes/bootstrap-kubelet.conf",
			File:  "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf",
		},
		{
			Name:  "kubeconfig",
			Value: "/etc/kubernetes/kubelet.conf",
			File:  "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf",
		},
		{
			Name:  "config",
			Value: "/var/lib/kubelet/config.yaml",
			File:  "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf",
		},
		{Name: "container-runtime-endpoint", Value: "unix:///run/containerd/containerd.sock", File: env},
		{Name: "network-plugin", Value: "cni", File: env},
		{Name: "fail-swap-on", Value: "true", File: "/etc/default/kubelet"},
	}
	if diff := cmp.Diff(want, k.Flags); diff != "" {
		t.Error(diff)
	}
	if k.Version != "v1.31.4" || k.Minor != 31 || !k.Joined || k.Admin || !k.Present || k.ConfigErr != "" {
		t.Errorf("%+v", k)
	}

	off := false
	if diff := cmp.Diff(finding.KubeletConfig{
		CgroupDriver: "systemd",
		FailSwapOn:   &off,
		FeatureGates: map[string]bool{"A": true},
		EvictionHard: map[string]string{"nodefs.available": "5%"},
	}, k.Config); diff != "" {
		t.Error(diff)
	}
}

func TestKubeletWithoutUnit(t *testing.T) {
	p := tree(t, map[string]string{
		"/proc/5/cmdline":            "/opt/kubelet\x00--config\x00/etc/k.yaml\x00--config-dir=/etc/k.d\x00",
		"/etc/k.yaml":                "cgroupDriver: systemd\ncontainerRuntimeEndpoint: unix:///a\n",
		"/etc/k.d/10.conf":           "containerRuntimeEndpoint: unix:///b\n",
		"/etc/k.d/20.yaml":           "containerRuntimeEndpoint: unix:///c\n",
		"/etc/sysconfig/kubelet":     "KUBELET_EXTRA_ARGS='--v=2'\n",
		"/proc/6/cmdline":            "/opt/kubelet-other\x00",
		"/etc/kubernetes/admin.conf": "",
	})

	k := p.kubelet(t.Context())
	if k.Config.ContainerRuntimeEndpoint != "unix:///b" || k.ConfigFile != "/etc/k.yaml" || !k.Admin ||
		k.Flags[0].File != "/etc/sysconfig/kubelet" {
		t.Errorf("%+v", k)
	}

	p = tree(t, map[string]string{"/var/lib/kubelet/config.yaml": "cgroupDriver: [\n"})
	if k := p.kubelet(t.Context()); k.ConfigErr == "" || k.ConfigFile == "" {
		t.Errorf("%+v", k)
	}
}

func TestMinor(t *testing.T) {
	for v, want := range map[string]int{"v1.36.3": 36, "v1.31.0-rc.1": 31, "v1.28+": 0, "v2.1.0": 0, "": 0, "1": 0} {
		t.Run(v, func(t *testing.T) {
			if got := minor(v); got != want {
				t.Errorf("got %d, want %d", got, want)
			}
		})
	}
}

func TestNode(t *testing.T) {
	p := tree(t, map[string]string{
		"/proc/swaps": "Filename\t\t\t\tType\t\tSize\n/dev/sda2                               " +
			"partition\t2097148\t0\t-2\n",
		"/etc/fstab":                    "# /old none swap sw 0 0\nUUID=1 none swap sw 0 0\n",
		"/proc/filesystems":             "nodev\tsysfs\nnodev\toverlay\n",
		"/etc/group":                    "root:x:0:\ndocker:x:105:\n",
		"/proc/sys/net/ipv4/ip_forward": "1\n",
		"/etc/docker/daemon.json":       "{\n",
	})

	cfg, _ := flagsOf(t)
	n := p.node(t.Context(), cfg, "")
	if cmp.Diff([]string{"/dev/sda2"}, n.Swaps) != "" || !n.FstabSwap || !n.Overlay || !n.DockerGroup ||
		n.IPForward != "1" || n.BridgeNF != "" || len(n.OtherCRI) != 0 || n.Year < 2020 {
		t.Errorf("%+v", n)
	}

	if c := p.jsonFile("/etc/docker/daemon.json"); c.Error == "" || c.Text != "{" {
		t.Errorf("%+v", c)
	}
	if c := p.jsonFile("/etc/docker/none.json"); c.Error != "" || c.Text != "" {
		t.Errorf("%+v", c)
	}
	if bare := tree(t, nil); bare.hasFstabSwap() || bare.hasOverlay() || bare.hasGroup("docker") {
		t.Error("empty tree: got swap, overlayfs or group docker")
	}
}

func TestMountPoint(t *testing.T) {
	p := tree(t, map[string]string{
		"/proc/self/mountinfo": "1 0 8:1 / / rw - ext4 a rw\n2 1 0:1 / /run rw - tmpfs t rw\n3 2 0:2 / " +
			"/run/cri-dockerd ro - tmpfs t ro\n4 2 0:2 / /run/cri-dockerd2 ro - tmpfs t ro\n",
	})

	for path, want := range map[string]string{
		"/run/cri-dockerd/x": "/run/cri-dockerd",
		"/run/cri-dockerd":   "/run/cri-dockerd",
		"/run/x":             "/run",
		"/var":               "/",
	} {
		t.Run(path, func(t *testing.T) {
			if got := p.mountPoint(path); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

func TestCNI(t *testing.T) {
	p := tree(t, map[string]string{
		"/n/05.conflist": "{",
		"/n/10.conflist": `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge",` +
			`"ipam":{"type":"host-local"}},{"type":"portmap"}]}`,
		"/b/host-local": "", "/usr/lib/cni/bridge": "",
	})

	cfg, _ := flagsOf(t, "--cni-conf-dir=/n", "--cni-bin-dir=/b")
	c := p.cni(cfg)
	if len(c.Files) != 2 || c.Files[0].Error == "" ||
		c.Files[1] != (finding.CNIFile{File: "/n/10.conflist", Network: "net"}) || !c.Bridge {
		t.Errorf("%+v", c)
	}

	if cmp.Diff([]string{"bridge", "portmap"}, c.Missing) != "" || c.Found["bridge"] != "/usr/lib/cni/bridge" {
		t.Errorf("%+v", c)
	}

	cfg.NetworkPlugin = "kubenet"
	if c := p.cni(cfg); cmp.Diff([]string{"bridge", "portmap"}, c.Missing) != "" {
		t.Errorf("%+v", c)
	}
}

// TestStaleCNIConfiguration has a configuration of a removed add-on. The daemon ignores it.
func TestStaleCNIConfiguration(t *testing.T) {
	p := tree(t, map[string]string{
		"/n/05-weave.conflist": `{"cniVersion":"1.0.0","name":"weave","plugins":[{"type":"weave-net"},` +
			`{"type":"portmap"}]}`,
		"/n/10.conflist": `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"azure-vnet",` +
			`"ipam":{"type":"azure-cns"}},{"type":"portmap"}]}`,
		"/b/azure-vnet": "",
	})

	cfg, _ := flagsOf(t, "--cni-conf-dir=/n", "--cni-bin-dir=/b")
	c := p.cni(cfg)
	if len(c.Files) != 2 || !strings.Contains(c.Files[0].Error, "weave-net") || c.Files[1].Error != "" {
		t.Errorf("files %+v", c.Files)
	}
	if cmp.Diff([]string{"portmap"}, c.Missing) != "" {
		t.Errorf("missing plugins %+v", c.Missing)
	}
}

func TestProblem(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]finding.Problem{
		"none":  finding.Missing,
		"file":  finding.NoSocket,
		"dead":  finding.Refused,
		"alive": "",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			switch name {
			case "file":
				if err := os.WriteFile(path, nil, 0o644); err != nil {
					t.Fatal(err)
				}

			case "dead", "alive":
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
				if err != nil {
					t.Fatal(err)
				}
				l.SetUnlinkOnClose(false)
				defer l.Close()
				if name == "dead" {
					l.Close()
				}
			}

			c, got, err := dial(t.Context(), path)
			if got != want || (err == nil) != (want == "") {
				t.Errorf("got %q, %v; want %q", got, err, want)
			}

			if c != nil {
				if cred, err := rootonly.Peer(c); err != nil || int(cred.Pid) != os.Getpid() {
					t.Errorf("peer %+v, %v", cred, err)
				}
				c.Close()
			}
		})
	}

	for err, want := range map[error]finding.Problem{
		syscall.EACCES:           finding.Denied,
		os.ErrDeadlineExceeded:   finding.Silent,
		context.DeadlineExceeded: finding.Silent,
		errors.New("x"):          finding.Other,
	} {
		t.Run(err.Error(), func(t *testing.T) {
			if got := problem(err); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// TestListening finds this process as a TCP listener and as the holder of a lock.
func TestListening(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	p := New(Timeout)
	if got := p.listening(os.Getpid()); cmp.Diff([]string{l.Addr().String()}, got) != "" {
		t.Errorf("%v, want %v", got, l.Addr())
	}

	cfg, _ := flagsOf(t)
	if s := p.streaming(t.Context(), os.Getpid(), cfg); !s.Known || s.Error != "" || s.LoopbackDown {
		t.Errorf("%+v", s)
	}

	file, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	if got := p.lockHolder(file.Name()); got != 0 {
		t.Errorf("unlocked file: got holder %d", got)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}

	if got := p.lockHolder(file.Name()); got != os.Getpid() {
		t.Errorf("locked file: got holder %d, want %d", got, os.Getpid())
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	if d := New(Timeout).directory("run-directory", filepath.Join(dir, "not", "yet")); d.Error != "" ||
		d.ReadOnly != "" {
		t.Errorf("%+v", d)
	}
}

func TestSplit(t *testing.T) {
	for in, want := range map[string][]string{
		`a  b`: {"a", "b"}, `"a b"=c d`: {"a b=c", "d"}, `'x "y"' ""`: {`x "y"`, ""}, "": nil,
	} {
		t.Run(in, func(t *testing.T) {
			if diff := cmp.Diff(want, split(in)); diff != "" {
				t.Errorf("%s", diff)
			}
		})
	}
}
