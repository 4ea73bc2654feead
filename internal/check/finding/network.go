package finding

import (
	"slices"
	"strings"

	"cri-dockerd/internal/shell"
)

func networkRules() []rule {
	return []rule{
		{"ip-forward", "packets are forwarded", []string{"engine"}, judgeForward}, // Docker turns it on at its start
		{"cni-config", "CNI configuration", nil, judgeCNIConfig},
		{"cni-plugins", "CNI plugins", []string{"cni-config"}, judgeCNIPlugins},
		{"bridge-nf", "bridged packets pass iptables", []string{"cni-config", "cni-plugins"}, judgeBridgeNF},
		{"network-ready", "the pod network is ready", []string{"engine", "daemon", "cni-config", "cni-plugins"},
			judgeNetwork},
	}
}

// flannel is the network add-on of the tutorials, and where it is.
const flannel = "https://github.com/flannel-io/flannel/releases/latest/download/kube-flannel.yml"

// bridgeNetwork connects the pods of one node, which is all that a node outside a cluster needs.
const bridgeNetwork = `{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0",` +
	`"isGateway":true,"ipMasq":true,` +
	`"ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},` +
	`{"type":"portmap","capabilities":{"portMappings":true}}]}`

// addNetwork is the line that gives the node a pod network: the cluster's add-on, or a bridge on a
// node of its own.
func (f *Facts) addNetwork() shell.Line {
	switch {
	case f.Kubelet.Admin:
		return shell.Command("kubectl --kubeconfig /etc/kubernetes/admin.conf apply -f {}", flannel)
	case f.Kubelet.Joined:
		return shell.Command("kubectl apply -f {}", flannel).Note("on a control-plane node")
	}

	dir := f.Flags.CNIConfDir

	return shell.Command("mkdir -p {} && echo {} > {}", dir, bridgeNetwork, dir+"/10-bridge.conflist")
}

// firstValid is the configuration that counts.
func (f *Facts) firstValid() (CNIFile, bool) {
	i := slices.IndexFunc(f.CNI.Files, func(c CNIFile) bool { return c.Error == "" })
	if i < 0 {
		return CNIFile{}, false
	}
	return f.CNI.Files[i], true
}

func judgeCNIConfig(f *Facts) verdict {
	switch f.Flags.NetworkPlugin {
	case "kubenet":
		return ok("kubenet makes its own")
	case "":
		return warn(shell.Advice("give --network-plugin=cni and install a network add-on"),
			"pods are on Docker's own bridge: those of two nodes cannot reach each other, and may have the same "+
				"addresses")
	}

	dir := f.Flags.CNIConfDir
	valid, found := f.firstValid()
	var broken []CNIFile
	for _, c := range f.CNI.Files {
		if c.Error != "" {
			broken = append(broken, c)
		}
	}

	var move shell.Line
	if len(broken) > 0 {
		move = shell.Command("mv {} {}", broken[0].File, broken[0].File+".invalid")
	}

	switch {
	case f.CNI.Error != "":
		return fail(shell.Command("chmod a+rX {}", dir), "%s", f.CNI.Error)
	case found && len(broken) > 0:
		return warn(move, "%s is passed over: %s; %s counts", broken[0].File, broken[0].Error, valid.File)
	case found:
		return ok("%s, network %s", valid.File, valid.Network)
	case len(broken) > 0 && f.Kubelet.Joined:
		return fail(move.Note("and delete the network add-on's pod on this node: the next one writes it again"),
			"%s is not valid: %s", broken[0].File, broken[0].Error)
	case len(broken) > 0:
		return fail(move.And(f.addNetwork()), "%s is not valid: %s", broken[0].File, broken[0].Error)
	}

	return fail(f.addNetwork(), "no CNI configuration in %s: no network add-on is installed", dir)
}

// standardPlugins come with Debian's containernetworking-plugins; others come with a network
// add-on.
func standardPlugins() []string {
	return []string{"bridge", "host-local", "portmap", "bandwidth", "dhcp", "firewall", "host-device", "ipvlan",
		"loopback", "macvlan", "ptp", "sbr", "static", "tuning", "vlan", "vrf"}
}

func judgeCNIPlugins(f *Facts) verdict {
	dirs := f.Flags.CNIBinDirs
	_, configured := f.firstValid()
	switch {
	case f.Flags.NetworkPlugin == "":
		return skip("none are used")
	case f.Flags.NetworkPlugin == "cni" && !configured:
		return skip("not known without a configuration")
	case len(f.CNI.Missing) == 0:
		return ok("all that are needed, in %s", strings.Join(dirs, ", "))
	}

	return fail(f.addPlugins(), "%s is needed and is not in %s", strings.Join(f.CNI.Missing, ", "),
		strings.Join(dirs, ", "))
}

const installPlugins = "apt-get update && apt-get install -y containernetworking-plugins"

// addPlugins is the line that puts the missing plugins where the daemon looks: from elsewhere on
// this machine, or from a package.
func (f *Facts) addPlugins() shell.Line {
	dirs := f.Flags.CNIBinDirs
	name, dir := f.CNI.Missing[0], "/opt/cni/bin"
	if len(dirs) > 0 {
		dir = dirs[0]
	}

	standard := slices.Contains(standardPlugins(), name)
	switch {
	case f.CNI.Found[name] != "":
		fix := shell.Command("mkdir -p {}", dir)
		for _, m := range f.CNI.Missing {
			if at := f.CNI.Found[m]; at != "" {
				fix = fix.And(shell.Command("ln -sf {} {}", at, dir+"/"+m))
			}
		}
		return fix

	case standard && f.Debian && slices.Contains(dirs, "/usr/lib/cni"):
		return shell.Command(installPlugins)
	case standard && f.Debian:
		return shell.Command(installPlugins+" && mkdir -p {} && ln -sf /usr/lib/cni/* {}", dir, dir+"/")
	case standard:
		return shell.Advice("install the standard CNI plugins into {}: "+
			"https://github.com/containernetworking/plugins/releases", dir)
	}

	return shell.Advice("delete the pod of the network add-on on this node: its start puts {} into {}", name, dir)
}

func judgeNetwork(f *Facts) verdict {
	c, known := f.condition("NetworkReady")
	switch {
	case !known:
		return skip("not known")
	case !c.Status && f.Flags.NetworkPlugin == "kubenet":
		return fail(shell.Advice("give the daemon --pod-cidr=10.244.0.0/24 (another on each node), or the "+
			"controller manager --allocate-node-cidrs"),
			"%s: %s", c.Reason, c.Message)

	case !c.Status:
		return fail(shell.Advice("do what the reason says; journalctl -u {} -n 20 has more", f.daemonUnit()), "%s: %s",
			c.Reason, c.Message)
	case c.Message != "" && f.Flags.NetworkPlugin != "": // no-op's notice is cni-config's
		return warn(shell.Advice("see what the network reports"), "%s: %s", c.Reason, c.Message)
	}

	return ok("NetworkReady")
}
