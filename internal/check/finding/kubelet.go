package finding

import (
	"fmt"
	"slices"
	"strings"

	"cri-dockerd/internal/shell"
)

func kubeletRules() []rule {
	return []rule{
		{"kubelet-config", "kubelet configuration", nil, checkKubeletConfig},
		{"kubelet-flags", "kubelet flags are valid", nil, checkKubeletFlags},
		{"kubelet-endpoint", "the kubelet uses this daemon", []string{"kubelet-config"}, checkEndpoint},
		{"cri-sockets", "kubeadm finds a single CRI socket", nil, checkSockets},
		{"cgroup-driver", "the kubelet and Docker use the same cgroup driver", []string{"engine", "kubelet-config"},
			checkCgroupDriver},
		{"cgroup-v1", "the kubelet supports the cgroup version", []string{"kubelet-config"}, checkCgroupV1},
		{"swap", "the kubelet tolerates swap", []string{"kubelet-config"}, checkSwap},
	}
}

const noKubelet = "the kubelet is not installed"

// removedFlag is a former flag of the kubelet. The kubelet exits immediately on unknown flags.
// minor is the minor version of Kubernetes 1 without the flag (CHANGELOG-1.<minor>.md of
// Kubernetes).
type removedFlag struct {
	name        string
	minor       int
	replacement string
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
		{"experimental-dockershim-root-directory", 24, "none"},
		{"dynamic-config-dir", 24, "--config"},
		{"container-runtime", 27, "none"},
		{"keep-terminated-pod-volumes", 31, "none"},
		{"pod-infra-container-image", 35, "the daemon's --pod-infra-container-image, or none"},
	}
}

func checkKubeletConfig(f *Facts) result {
	k := f.Kubelet
	u, untrusted := f.untrusted(k.ConfigFile)
	switch {
	case !k.Present:
		return skip(noKubelet)
	case untrusted:
		return fail(u.fix(), "%s is not trusted because users other than root can change it: %s", k.ConfigFile,
			u.Reason)
	case k.ConfigErr != "":
		return fail(shell.Advice("correct {}, or recreate it: kubeadm upgrade node phase kubelet-config",
			k.ConfigFile), "%s", k.ConfigErr)
	case k.ConfigFile == "":
		return ok("no file, the kubelet's defaults apply")
	}

	return ok("%s", k.ConfigFile)
}

func checkKubeletFlags(f *Facts) result {
	k := f.Kubelet
	if !k.Present {
		return skip(noKubelet)
	}

	var names, details []string
	for _, r := range removedFlags() {
		if (k.Minor >= r.minor || k.Minor == 0) && slices.ContainsFunc(k.Flags, func(g Flag) bool {
			return g.Name == r.name
		}) {
			names = append(names, r.name)
			details = append(details, fmt.Sprintf("--%s (removed in 1.%d, replacement: %s)", r.name, r.minor,
				r.replacement))
		}
	}

	switch {
	case len(names) == 0 && k.Minor == 0:
		return skip("the version of the kubelet is unknown")
	case len(names) == 0:
		return ok("kubelet %s", k.Version)
	}

	fix := shell.Advice("remove {} from the command line of the kubelet", "--"+strings.Join(names, " --"))
	if files := f.filesWith(names...); len(files) > 0 {
		fix = f.thenRestartKubelet(dropFlags(files, names...).And(f.reloadUnits(names...)))
	}

	if k.Minor == 0 {
		return warn(fix, "the version of the kubelet is unknown; recent versions do not start with %s",
			strings.Join(details, ", "))
	}

	return fail(fix, "kubelet %s does not start with %s", k.Version, strings.Join(details, ", "))
}

// flag returns the effective occurrence of a flag.
func (k *Kubelet) flag(name string) (Flag, bool) {
	for _, f := range slices.Backward(k.Flags) {
		if f.Name == name {
			return f, true
		}
	}
	return Flag{}, false
}

// defaultEndpoint is the kubelet's default since 1.27. Earlier kubelets have no default: without an
// endpoint they use dockershim.
const defaultEndpoint = "unix:///run/containerd/containerd.sock"

// isSameEndpoint compares addresses of unix sockets, with or without the scheme. It treats /var/run
// as /run.
func isSameEndpoint(a, b string) bool {
	plain := func(s string) string {
		s = strings.TrimPrefix(s, "unix://")
		if rest, found := strings.CutPrefix(s, "/var/run/"); found {
			s = "/run/" + rest
		}
		return s
	}

	return plain(a) == plain(b)
}

// endpoint returns the kubelet's address of the CRI. The second result is false for the default.
func (k *Kubelet) endpoint() (string, bool) {
	if fl, given := k.flag("container-runtime-endpoint"); given {
		return fl.Value, true
	}
	if e := k.Config.ContainerRuntimeEndpoint; e != "" {
		return e, true
	}
	return defaultEndpoint, false
}

// isConfigured reports whether the kubelet has any configuration. Before kubeadm init or join it
// has none.
func (k *Kubelet) isConfigured() bool { return k.ConfigFile != "" || len(k.Flags) > 0 }

// warnUntilConfigured downgrades a failure to a warning while the kubelet is not configured.
func (k *Kubelet) warnUntilConfigured(v result) result {
	if !k.isConfigured() {
		v.status = Warn
	}
	return v
}

func checkEndpoint(f *Facts) result {
	k, want := f.Kubelet, f.Flags.Endpoint
	if !k.Present {
		return skip(noKubelet)
	}

	current, isSet := k.endpoint()
	switch {
	case isSameEndpoint(current, want):
		return ok("%s", current)
	case !isSet && !k.isConfigured():
		return skip("the kubelet is not configured")
	}

	if !isSet {
		current += " (default)"
	}

	var fix shell.Line
	flag, _ := k.flag("container-runtime-endpoint")
	switch {
	case flag.File != "" && shell.IsPlain(want):
		fix = f.thenRestartKubelet(shell.Command("sed -i -E {} {}",
			`s#--container-runtime-endpoint[= ][^ "]*#--container-runtime-endpoint=`+want+"#", flag.File).
			And(f.reloadUnits("container-runtime-endpoint")))

	case flag.Name != "" || !shell.IsPlain(want):
		fix = shell.Advice("set --container-runtime-endpoint={} for the kubelet", want)
	case k.Minor != 0 && k.Minor < 27: // its configuration has no key for the endpoint
		flags := "--container-runtime=remote --container-runtime-endpoint=" + want
		fix = f.thenRestartKubelet(addKubeletFlag(extraArgs, flags))
	default:
		fix = f.setKubelet("containerRuntimeEndpoint", want, "container-runtime-endpoint")
	}

	return fail(fix, "the kubelet uses the CRI endpoint %s instead of %s", current, want)
}

func checkSockets(f *Facts) result {
	k, others := f.Kubelet, f.Node.OtherCRI
	current, isSet := k.endpoint()
	switch {
	case len(others) == 0:
		return ok("no other CRI server is running")
	case isSet && isSameEndpoint(current, f.Flags.Endpoint):
		return ok("the kubelet uses this daemon; also running: %s", strings.Join(others, ", "))
	case !k.Kubeadm:
		return ok("kubeadm is not installed; also running: %s", strings.Join(others, ", "))
	case f.Kubelet.Joined:
		return skip("the node is part of a cluster")
	}

	return warn(shell.Command("kubeadm init --cri-socket {}", f.Flags.Endpoint),
		"another CRI server is running: %s (containerd is part of Docker); kubeadm requires --cri-socket for init, "+
			"join and reset, or criSocket in its configuration", strings.Join(others, ", "))
}

// usesRuntimeDriver reports whether the kubelet uses the cgroup driver from the CRI's
// RuntimeConfig: feature gate KubeletCgroupDriverFromCRI, alpha in 1.28, enabled by default since
// 1.31, locked since 1.34.
func (k *Kubelet) usesRuntimeDriver() bool {
	gate, isSet := k.Config.FeatureGates["KubeletCgroupDriverFromCRI"]
	if fl, given := k.flag("feature-gates"); given {
		for pair := range strings.SplitSeq(fl.Value, ",") {
			if name, value, _ := strings.Cut(pair, "="); name == "KubeletCgroupDriverFromCRI" {
				gate, isSet = strings.EqualFold(value, "true"), true
			}
		}
	}

	switch {
	case k.Minor >= 34:
		return true
	case k.Minor < 28:
		return false
	case isSet:
		return gate
	}

	return k.Minor >= 31
}

func checkCgroupDriver(f *Facts) result {
	k, docker := f.Kubelet, f.Engine.CgroupDriver
	switch {
	case !k.Present:
		return skip(noKubelet)
	case docker == "":
		return skip("the cgroup driver of Docker is unknown")
	case k.usesRuntimeDriver():
		return ok("%s; the kubelet gets the driver from the CRI", docker)
	}

	driver := k.Config.CgroupDriver
	if fl, given := k.flag("cgroup-driver"); given {
		driver = fl.Value
	}

	if driver == "" {
		if k.Minor == 0 || k.ConfigFile == "" {
			return skip("the kubelet is not configured, or its version is unknown")
		}
		driver = "cgroupfs"
	}

	if driver == docker {
		return ok("%s", docker)
	}

	return fail(f.setKubelet("cgroupDriver", docker, "cgroup-driver"),
		"the kubelet uses the cgroup driver %s and Docker uses %s: pods cannot start", driver, docker)
}

func checkCgroupV1(f *Facts) result {
	k := f.Kubelet
	switch {
	case !f.Node.CgroupV1:
		return ok("cgroup v2")
	case !k.Present:
		return skip("cgroup v1; " + noKubelet)
	}

	fails, note := k.Config.FailCgroupV1, ""
	if fl, given := k.flag("fail-cgroupv1"); given {
		yes := fl.Value != "false"
		fails = &yes
	}

	switch {
	case fails == nil && k.Minor == 0:
		return skip("cgroup v1; the version of the kubelet is unknown")
	case fails == nil && k.Minor < 35, fails != nil && !*fails:
		return ok("cgroup v1, supported by this kubelet")
	case fails == nil:
		note = ", the default since 1.35"
	}

	return k.warnUntilConfigured(fail(f.setKubelet("failCgroupV1", "false", "fail-cgroupv1"),
		"this node uses cgroup v1, and kubelet %s does not start on it (failCgroupV1: true%s)",
		k.Version, note))
}

func checkSwap(f *Facts) result {
	k, swaps := f.Kubelet, f.Node.Swaps
	if len(swaps) == 0 {
		return ok("swap is disabled")
	}

	fails := k.Config.FailSwapOn
	if fl, given := k.flag("fail-swap-on"); given {
		yes := fl.Value != "false"
		fails = &yes
	}

	switch {
	case !k.Present:
		return skip("swap is enabled; " + noKubelet)
	case fails != nil && !*fails:
		return ok("swap is enabled and tolerated (failSwapOn: false)")
	case k.ConfigFile != "":
		return fail(f.setKubelet("failSwapOn", "false", "fail-swap-on"),
			"swap is enabled (%s), and the kubelet does not start with it (failSwapOn: true)",
			strings.Join(swaps, ", "))
	}

	fix := shell.Command("swapoff").Args(swaps...)
	if f.Node.FstabSwap {
		fix = fix.And(shell.Command("sed -i.before-kubernetes -E " +
			"'/^[^#].*[[:space:]]swap[[:space:]]/s/^/#/' /etc/fstab"))
	}

	return k.warnUntilConfigured(fail(fix,
		"swap is enabled (%s), and the kubelet does not start with it unless failSwapOn is false",
		strings.Join(swaps, ", ")))
}
