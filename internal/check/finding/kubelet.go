package finding

import (
	"fmt"
	"slices"
	"strings"

	"cri-dockerd/internal/shell"
)

func kubeletRules() []rule {
	return []rule{
		{"kubelet-config", "the kubelet's configuration", nil, judgeKubeletConfig},
		{"kubelet-flags", "the kubelet knows all its flags", nil, judgeKubeletFlags},
		{"kubelet-endpoint", "the kubelet speaks to this daemon", []string{"kubelet-config"}, judgeEndpoint},
		{"cri-sockets", "kubeadm knows which CRI server to use", nil, judgeSockets},
		{"cgroup-driver", "the kubelet's cgroup driver is Docker's", []string{"engine", "kubelet-config"},
			judgeCgroupDriver},
		{"cgroup-v1", "the kubelet takes this machine's cgroups", []string{"kubelet-config"}, judgeCgroupV1},
		{"swap", "the kubelet takes this machine's swap", []string{"kubelet-config"}, judgeSwap},
	}
}

const noKubelet = "there is no kubelet here"

// removedFlag is a flag that kubelets of existing nodes were given, and the minor version of
// Kubernetes 1 from which it is unknown: such a kubelet ends at once. From CHANGELOG-1.<minor>.md
// of Kubernetes.
type removedFlag struct {
	name  string
	minor int
	use   string // in its place
}

func removedFlags() []removedFlag {
	return []removedFlag{
		{"network-plugin", 24, "the daemon's --network-plugin"},
		{"network-plugin-mtu", 24, "the daemon's --network-plugin-mtu"},
		{"cni-conf-dir", 24, "the daemon's --cni-conf-dir"},
		{"cni-bin-dir", 24, "the daemon's --cni-bin-dir"},
		{"cni-cache-dir", 24, "the daemon's --cni-cache-dir"},
		{"docker-endpoint", 24, "the daemon's --docker-endpoint"},
		{"image-pull-progress-deadline", 24, "the daemon's --image-pull-progress-deadline"},
		{"experimental-dockershim-root-directory", 24, "nothing"},
		{"dynamic-config-dir", 24, "--config"},
		{"container-runtime", 27, "nothing"},
		{"keep-terminated-pod-volumes", 31, "nothing"},
		{"pod-infra-container-image", 35, "the daemon's --pod-infra-container-image, or nothing"},
	}
}

func judgeKubeletConfig(f *Facts) verdict {
	k := f.Kubelet
	u, untrusted := f.untrusted(k.ConfigFile)
	switch {
	case !k.Present:
		return skip(noKubelet)
	case untrusted:
		return fail(u.fix(), "%s is not read, since other users can change it, and with it the kubelet: %s",
			k.ConfigFile, u.Reason)
	case k.ConfigErr != "":
		return fail(shell.Advice("correct {}, or write it anew: kubeadm upgrade node phase kubelet-config",
			k.ConfigFile), "%s", k.ConfigErr)
	case k.ConfigFile == "":
		return ok("none yet, the kubelet's defaults hold")
	}

	return ok("%s", k.ConfigFile)
}

func judgeKubeletFlags(f *Facts) verdict {
	k := f.Kubelet
	if !k.Present {
		return skip(noKubelet)
	}

	var names, said []string
	for _, r := range removedFlags() {
		if (k.Minor >= r.minor || k.Minor == 0) && slices.ContainsFunc(k.Flags, func(g Flag) bool {
			return g.Name == r.name
		}) {
			names = append(names, r.name)
			said = append(said, fmt.Sprintf("--%s (removed in 1.%d, in its place: %s)", r.name, r.minor, r.use))
		}
	}

	switch {
	case len(names) == 0 && k.Minor == 0:
		return skip("the kubelet's version is not known")
	case len(names) == 0:
		return ok("kubelet %s", k.Version)
	}

	fix := shell.Advice("take {} out of the command line of the kubelet", "--"+strings.Join(names, " --"))
	if files := f.filesWith(names...); len(files) > 0 {
		fix = f.restarted(dropFlags(files, names...).And(f.reloadUnits(names...)))
	}

	if k.Minor == 0 {
		return warn(fix, "the kubelet's version is not known; newer ones do not start with %s",
			strings.Join(said, ", "))
	}

	return fail(fix, "kubelet %s does not start with %s", k.Version, strings.Join(said, ", "))
}

// flag is the value of a flag that counts, and whether it was given.
func (k *Kubelet) flag(name string) (Flag, bool) {
	for _, f := range slices.Backward(k.Flags) {
		if f.Name == name {
			return f, true
		}
	}
	return Flag{}, false
}

// defaultEndpoint is a kubelet's from 1.27 on; those before had none, and do without the CRI's
// address only with dockershim.
const defaultEndpoint = "unix:///run/containerd/containerd.sock"

// sameEndpoint compares addresses of unix sockets, with or without the scheme, below /run or
// /var/run.
func sameEndpoint(a, b string) bool {
	plain := func(s string) string {
		s = strings.TrimPrefix(s, "unix://")
		if rest, found := strings.CutPrefix(s, "/var/run/"); found {
			s = "/run/" + rest
		}
		return s
	}

	return plain(a) == plain(b)
}

// endpoint is where the kubelet finds the CRI, and whether anybody has said so.
func (k *Kubelet) endpoint() (string, bool) {
	if fl, given := k.flag("container-runtime-endpoint"); given {
		return fl.Value, true
	}
	if e := k.Config.ContainerRuntimeEndpoint; e != "" {
		return e, true
	}
	return defaultEndpoint, false
}

// configured says whether anybody has told the kubelet anything: before kubeadm nobody has.
func (k *Kubelet) configured() bool { return k.ConfigFile != "" || len(k.Flags) > 0 }

// sooner makes a warning of what will stop the kubelet only when it is configured.
func (k *Kubelet) sooner(v verdict) verdict {
	if !k.configured() {
		v.status = Warn
	}
	return v
}

func judgeEndpoint(f *Facts) verdict {
	k, want := f.Kubelet, f.Flags.Endpoint
	if !k.Present {
		return skip(noKubelet)
	}

	is, said := k.endpoint()
	switch {
	case sameEndpoint(is, want):
		return ok("%s", is)
	case !said && !k.configured():
		return skip("the kubelet is not configured yet")
	}

	if !said {
		is += ", its default"
	}

	var fix shell.Line
	flag, _ := k.flag("container-runtime-endpoint")
	switch {
	case flag.File != "" && shell.IsPlain(want):
		fix = f.restarted(shell.Command("sed -i -E {} {}",
			`s#--container-runtime-endpoint[= ][^ "]*#--container-runtime-endpoint=`+want+"#", flag.File).
			And(f.reloadUnits("container-runtime-endpoint")))

	case flag.Name != "" || !shell.IsPlain(want):
		fix = shell.Advice("give the kubelet --container-runtime-endpoint={}", want)
	case k.Minor != 0 && k.Minor < 27: // its configuration has no such key yet
		fix = f.restarted(addKubeletFlag(extraArgs, "--container-runtime=remote --container-runtime-endpoint="+want))
	default:
		fix = f.setKubelet("containerRuntimeEndpoint", want, "container-runtime-endpoint")
	}

	return fail(fix, "the kubelet speaks to %s, not to %s", is, want)
}

func judgeSockets(f *Facts) verdict {
	k, others := f.Kubelet, f.Node.OtherCRI
	is, said := k.endpoint()
	switch {
	case len(others) == 0:
		return ok("there is no other")
	case said && sameEndpoint(is, f.Flags.Endpoint):
		return ok("this one, beside %s", strings.Join(others, ", "))
	case !k.Kubeadm:
		return ok("there is no kubeadm here, but %s", strings.Join(others, ", "))
	case f.Kubelet.Joined:
		return skip("the node has been joined")
	}

	return warn(shell.Command("kubeadm init --cri-socket {}", f.Flags.Endpoint),
		"beside this daemon %s answers (Docker brings containerd), and kubeadm cannot choose: give --cri-socket to "+
			"init, join and reset, or criSocket in its configuration", strings.Join(others, ", "))
}

// asksDriver says whether the kubelet takes the cgroup driver that the runtime tells
// (RuntimeConfig): feature KubeletCgroupDriverFromCRI, alpha in 1.28, on from 1.31 on, for good
// from 1.34 on.
func (k *Kubelet) asksDriver() bool {
	gate, said := k.Config.FeatureGates["KubeletCgroupDriverFromCRI"]
	if fl, given := k.flag("feature-gates"); given {
		for pair := range strings.SplitSeq(fl.Value, ",") {
			if name, value, _ := strings.Cut(pair, "="); name == "KubeletCgroupDriverFromCRI" {
				gate, said = strings.EqualFold(value, "true"), true
			}
		}
	}

	switch {
	case k.Minor >= 34:
		return true
	case k.Minor < 28:
		return false
	case said:
		return gate
	}

	return k.Minor >= 31
}

func judgeCgroupDriver(f *Facts) verdict {
	k, docker := f.Kubelet, f.Engine.CgroupDriver
	if !k.Present || docker == "" {
		return skip("not known, or " + noKubelet)
	}
	if k.asksDriver() {
		return ok("%s; the kubelet asks the daemon", docker)
	}

	is := k.Config.CgroupDriver
	if fl, given := k.flag("cgroup-driver"); given {
		is = fl.Value
	}

	if is == "" {
		if k.Minor == 0 || k.ConfigFile == "" {
			return skip("the kubelet is not configured yet, or its version is not known")
		}
		is = "cgroupfs"
	}

	if is == docker {
		return ok("%s", docker)
	}

	return fail(f.setKubelet("cgroupDriver", docker, "cgroup-driver"),
		"the kubelet uses %s, Docker %s: no pod can start", is, docker)
}

func judgeCgroupV1(f *Facts) verdict {
	k := f.Kubelet
	switch {
	case !f.Node.CgroupV1:
		return ok("cgroup v2")
	case !k.Present:
		return skip("cgroup v1; " + noKubelet)
	}

	fails, said := k.Config.FailCgroupV1, ""
	if fl, given := k.flag("fail-cgroupv1"); given {
		yes := fl.Value != "false"
		fails = &yes
	}

	switch {
	case fails == nil && k.Minor == 0:
		return skip("cgroup v1; the kubelet's version is not known")
	case fails == nil && k.Minor < 35, fails != nil && !*fails:
		return ok("cgroup v1, which this kubelet takes")
	case fails == nil:
		said = ", its default from 1.35 on"
	}

	return k.sooner(fail(f.setKubelet("failCgroupV1", "false", "fail-cgroupv1"),
		"this machine has cgroup v1, and kubelet %s does not start there (failCgroupV1: true%s)", k.Version, said))
}

func judgeSwap(f *Facts) verdict {
	k, swaps := f.Kubelet, f.Node.Swaps
	if len(swaps) == 0 {
		return ok("there is none")
	}

	fails := k.Config.FailSwapOn
	if fl, given := k.flag("fail-swap-on"); given {
		yes := fl.Value != "false"
		fails = &yes
	}

	switch {
	case !k.Present:
		return skip("swap is on; " + noKubelet)
	case fails != nil && !*fails:
		return ok("on, and the kubelet does not mind (failSwapOn: false)")
	case k.ConfigFile != "":
		return fail(f.setKubelet("failSwapOn", "false", "fail-swap-on"),
			"swap is on (%s), and the kubelet does not start with it (failSwapOn)", strings.Join(swaps, ", "))
	}

	fix := shell.Command("swapoff").Args(swaps...)
	if f.Node.FstabSwap {
		fix = fix.And(shell.Command(`sed -i.before-kubernetes -E '/^[^#].*[[:space:]]swap[[:space:]]/s/^/#/' ` +
			`/etc/fstab`))
	}

	return k.sooner(fail(fix, "swap is on (%s), and a kubelet does not start with it unless failSwapOn is false",
		strings.Join(swaps, ", ")))
}
