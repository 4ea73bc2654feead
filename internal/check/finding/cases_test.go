package finding

import (
	"slices"
	"time"
)

const flagsEnv = "/var/lib/kubelet/kubeadm-flags.env"

// broken is a fault of an otherwise healthy node and its root cause.
type broken struct {
	name  string
	first string // ID of the finding at the top of the report
	do    func(*Facts)
}

// cases returns the faults, at least one for each finding.
func cases() []broken {
	return slices.Concat(nodeCases(), engineCases(), slowCases(), daemonCases(), serviceCases(), networkCases(),
		kubeletCases())
}

func nodeCases() []broken {
	return []broken{
		{"not root", "privileges", func(f *Facts) { f.Root = false }},
		{"in a container", "privileges", func(f *Facts) {
			f.Foreign = "it does not run in the mount namespace of process 1"
		}},
		{"files owned by other users", "file-owner", func(f *Facts) {
			f.Untrusted = []Untrusted{{
				File:   "/opt/k/config.yaml",
				Path:   "/opt/k",
				Reason: "/opt/k belongs to user 1000",
			}, {File: "/tmp/x", Path: "/tmp", Reason: "everybody can write to /tmp", Shared: true}}
		}},
		{"kubelet configuration writable by other users", "kubelet-config", func(f *Facts) {
			f.Untrusted = []Untrusted{{
				File:   f.Kubelet.ConfigFile,
				Path:   "/var/lib/kubelet",
				Reason: "/var/lib/kubelet: everybody can write to it",
			}}
		}},
		{"daemon.json writable by other users", "engine-config", func(f *Facts) {
			f.Untrusted = []Untrusted{{
				File:   "/etc/docker/daemon.json",
				Path:   "/etc/docker/daemon.json",
				Reason: "/etc/docker/daemon.json: everybody can write to it",
			}}
			f.Engine.Config.Error, f.Engine.LiveRestore = "not read", false
		}},
		{"file in a world-writable directory", "file-owner", func(f *Facts) {
			f.Untrusted = []Untrusted{{
				File:   "/tmp/x",
				Path:   "/tmp",
				Reason: "everybody can write to /tmp",
				Shared: true,
			}}
		}},

		{"clock set to 1970", "clock", func(f *Facts) { f.Node.Year = 1970 }},
		{"clock not synchronized", "clock", func(f *Facts) { f.Node.ClockSynced = false }},
		{"run directory read-only", "directories", func(f *Facts) {
			f.Node.Directories[0].ReadOnly, f.Node.Directories[0].Error = "/run/cri-dockerd", "read-only file system"
			f.Daemon.Problem = Missing
		}},
		{"run directory not writable", "directories", func(f *Facts) {
			f.Node.Directories[0].Error = "permission denied"
		}},
		{"disk full", "disk", func(f *Facts) { f.Node.Disks[0].Free = 1 << 30 }},
		{"disk just above the threshold", "disk", func(f *Facts) {
			f.Node.Disks[0].Free = f.Node.Disks[0].Total * 153 / 1000
		}},
		{"disk just below the threshold", "disk", func(f *Facts) {
			f.Node.Disks[0].Free = f.Node.Disks[0].Total * 1499 / 10000
		}},
		{"disk nearly full", "disk", func(f *Facts) { f.Node.Disks[1].Free = 11 << 30 }},
		{"one disk full, another nearly full", "disk", func(f *Facts) {
			f.Node.Disks[0].Free, f.Node.Disks[1].Free = f.Node.Disks[0].Total*16/100, 1<<30
		}},
		{"no inodes", "disk", func(f *Facts) { f.Node.Disks[0].IFre = 3 }},
		{"custom eviction threshold", "disk", func(f *Facts) {
			f.Kubelet.Config.EvictionHard = map[string]string{"nodefs.available": "60Gi"}
		}},
		{"no group docker, no socket", "docker-group", func(f *Facts) {
			f.Node.DockerGroup, f.Daemon.Problem = false, Missing
		}},
		{"no group docker", "docker-group", func(f *Facts) {
			f.Node.DockerGroup, f.Daemon.Socket.Group = false, "root"
		}},
	}
}

func engineCases() []broken {
	down := func(p Problem, err string) func(*Facts) {
		return func(f *Facts) {
			f.Engine = Engine{
				Problem:   p,
				Error:     err,
				Slow:      20 * time.Second,
				Installed: true,
				Config:    f.Engine.Config,
			}
			f.Daemon.Conditions[0] = Condition{"RuntimeReady", false, "DockerNotReady", "ping the engine"}
			f.Node.IPForward = "0"
		}
	}

	return []broken{
		{"engine stopped", "engine", down(Missing, "")},
		{"engine killed", "engine", down(Refused, "")},
		{"engine not installed", "engine", func(f *Facts) { down(Missing, "")(f); f.Engine.Installed = false }},
		{"engine not permitted", "engine", down(Denied, "permission denied")},
		{"engine of another user", "engine", down(NotRoot, "a process of user 1000 listens at /var/run/docker.sock")},
		{"engine hangs", "engine", down(Silent, "context deadline exceeded")},
		{"engine with other certificates", "engine", down(TLS, "x509: certificate signed by unknown authority")},
		{"daemon.json broken", "engine-config", func(f *Facts) {
			down(Missing, "")(f)
			f.Engine.Config.Text, f.Engine.Config.Error = "{", "unexpected end of JSON input"
		}},
		{"daemon.json broken under a running engine", "engine-config", func(f *Facts) {
			f.Engine.Config.Text, f.Engine.Config.Error = "{", "unexpected end of JSON input"
		}},
		{"engine too old", "engine-version", func(f *Facts) {
			f.Engine.Problem, f.Engine.Version, f.Engine.API = TooOld, "19.03.15", "1.40"
		}},
		{"engine too new", "engine-version", func(f *Facts) { f.Engine.Version = "31.0.1" }},
		{"vfs", "storage-driver", func(f *Facts) { f.Engine.StorageDriver = "vfs" }},
		{"no overlayfs", "storage-driver", func(f *Facts) { f.Engine.StorageDriver, f.Node.Overlay = "vfs", false }},
		{"logs rotated twice", "engine-log-driver", func(f *Facts) {
			f.Flags.ContainerLog = "json-file"
			f.Engine.Config.Text, f.Engine.Config.Keys = "{…}",
				map[string]any{"log-opts": map[string]any{"max-size": "10m"}}
		}},
		{"userns-remap", "user-namespaces", func(f *Facts) { f.Engine.MapsUsers = true }},
		{"no live-restore", "live-restore", func(f *Facts) { f.Engine.LiveRestore = false }},

		{"live-restore disabled in daemon.json", "live-restore", func(f *Facts) {
			f.Engine.LiveRestore, f.Engine.Config.Keys = false, map[string]any{"live-restore": false}
		}},
		{"live-restore unset, other keys present", "live-restore", func(f *Facts) {
			f.Engine.LiveRestore, f.Engine.Config.Keys = false, map[string]any{"exec-opts": []any{}}
		}},
		{"registry of the sandbox image unreachable", "pause-image", func(f *Facts) {
			f.Flags.PauseImage, f.Engine.PauseImage = "registry.example/pause:3.10", "dial tcp: no route to host"
			f.Flags.Files = map[string]string{
				"pod-infra-container-image": "/etc/systemd/system/cri-docker.service.d/10-cni.conf",
			}
		}},
		{"sandbox image not present", "pause-image", func(f *Facts) {
			f.Flags.PauseImage, f.Engine.PauseImage, f.Engine.PausePullable = "registry.example/pause:3.10",
				"not pulled yet", true
		}},
		{"no CAP_SYS_RESOURCE", "cap-sys-resource", func(f *Facts) { f.Engine.MinOOMScore = 0 }},
	}
}

func daemonCases() []broken {
	unavailable := func(p Problem) func(*Facts) {
		return func(f *Facts) {
			f.Daemon.Problem, f.Daemon.Conditions, f.Daemon.Streaming, f.Daemon.Socket = p, nil, Streaming{}, Socket{}
			f.Logs.Problem = Missing
			f.Daemon.Slow = 20 * time.Second
		}
	}

	return []broken{
		{"daemon stopped", "daemon", unavailable(Missing)},
		{"daemon stopped, no systemd", "daemon", func(f *Facts) {
			unavailable(Refused)(f)
			f.Systemd = false
		}},
		{"daemon hangs", "daemon", unavailable(Silent)},
		{"daemon hangs, no systemd", "daemon", func(f *Facts) { unavailable(Silent)(f); f.Systemd = false }},
		{"directory at the path of the socket", "daemon", unavailable(NoSocket)},
		{"daemon of another user", "daemon", func(f *Facts) {
			unavailable(NotRoot)(f)
			f.Daemon.Error = "a process of user 1000 listens"
		}},
		{"daemon of another user, TCP", "daemon", func(f *Facts) { unavailable(NotRoot)(f); f.Flags.Socket = "" }},
		{"daemon not permitted", "daemon", unavailable(Denied)},
		{"older shim also running", "one-daemon", func(f *Facts) {
			f.Daemon.Processes = append(f.Daemon.Processes, Process{PID: 7, Program: "/usr/local/bin/cri-dockerd"})
			f.Daemon.Others = []string{"cri-dockerd.service"}
		}},
		{"older shim running without a unit", "one-daemon", func(f *Facts) {
			f.Daemon.Processes = []Process{{PID: 7, Program: "/usr/local/bin/cri-dockerd"}}
			unavailable(Missing)(f)
		}},
		{"two daemons", "one-daemon", func(f *Facts) {
			f.Daemon.Processes = append(f.Daemon.Processes, Process{
				PID:     50,
				Program: "/usr/bin/cri-dockerd",
				Ours:    true,
			})
		}},
		{"lock held by another process", "one-daemon", func(f *Facts) {
			unavailable(Missing)(f)
			f.Daemon.LockHolder = 55
		}},
		{"unit of an older shim enabled", "one-daemon", func(f *Facts) {
			f.Daemon.Others = []string{"cri-dockerd.service"}
		}},
		{"world-writable socket", "daemon-socket", func(f *Facts) { f.Daemon.Socket.Mode = 0o666 }},
		{"socket with group root", "daemon-socket", func(f *Facts) { f.Daemon.Socket.Group = "root" }},
		{"misspelled flag", "daemon-flags", func(f *Facts) {
			unavailable(Silent)(f)
			f.Flags.Mistake = Mistake{"unknown flag: --network-plugn", "network-plugn", "/etc/default/cri-docker",
				"network-plugin"}
		}},
		{"invalid value of a flag", "daemon-flags", func(f *Facts) {
			unavailable(Silent)(f)
			f.Flags.Mistake = Mistake{"invalid argument", "network-plugin-mtu", "/etc/default/cri-docker", ""}
		}},
		{"contradictory flags", "daemon-flags", func(f *Facts) {
			unavailable(Silent)(f)
			f.Flags.Mistake.Error = "--pod-cidr"
		}},
		{"not enabled", "service-enabled", func(f *Facts) { f.Daemon.Enabled = false }},
		{"no unit", "service-enabled", func(f *Facts) { f.Daemon.Unit = "" }},
	}
}

// serviceCases returns the faults of the daemon's services: log-driver process, conditions,
// streaming.
func serviceCases() []broken {
	return []broken{
		{"log-driver hangs", "log-driver", func(f *Facts) { f.Logs.Problem, f.Logs.Slow = Silent, 20*time.Second }},
		{"log-driver hangs, no systemd", "log-driver", func(f *Facts) {
			f.Logs.Problem, f.Logs.Slow, f.Systemd = Silent, 20*time.Second, false
		}},
		{"log-driver without a unit hangs", "log-driver", func(f *Facts) {
			f.Logs.Problem, f.Logs.Slow, f.Logs.Unit = Silent, 20*time.Second, false
		}},
		{"log-driver stopped", "log-driver", func(f *Facts) {
			f.Logs.Problem, f.Logs.PID = Refused, 0
			f.Daemon.Conditions[0] = Condition{"RuntimeReady", false, "LogDriverNotReady", "stopped"}
		}},

		{"runtime not ready", "runtime-ready", func(f *Facts) {
			f.Daemon.Conditions[0] = Condition{"RuntimeReady", false, "DockerNotReady", "reading all containers"}
		}},
		{"json-file logs instead of CRI logs", "container-logs", func(f *Facts) {
			f.Daemon.Conditions[2] = Condition{"ContainerLogs", false, "JSONFile",
				"the engine cannot use the log-driver process"}
		}},
		{"engine creates network namespaces", "pod-netns", func(f *Facts) {
			f.Daemon.Conditions[3] = Condition{"PodNetworkNamespaces", false, "CreatedByEngine",
				"the pause may not join"}
		}},
		{"no shim in the PATH of containerd", "containerd-shim", func(f *Facts) {
			f.Flags.Containers = "auto"
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"ContainerdShim", false, "CreatedByEngine",
				"binary not installed"})
		}},
		{"no result of the trial of the shim", "containerd-shim", func(f *Facts) {
			f.Flags.Containers = "auto"
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"ContainerdShim", false, "Overdue",
				"context deadline exceeded"})
		}},
		{"an engine without annotations, but the shim is required", "containerd-shim", func(f *Facts) {
			f.Flags.Containers = "shim"
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"ContainerdShim", false, "NotSupported",
				"Docker Engine 20.10 has no annotations; Engine 24 has"})
		}},
		{"no shim, but it is required", "containerd-shim", func(f *Facts) {
			f.Flags.Containers = "shim"
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"ContainerdShim", false, "CreatedByEngine",
				"binary not installed"})
		}},
		{"an NRI plugin without an index", "nri-files", func(f *Facts) {
			f.NRI.Misnamed = []string{"/opt/nri/plugins/logger"}
		}},
		{"a misspelled rule for NRI plugins", "nri-files", func(f *Facts) {
			f.NRI.Validator = "/etc/nri/validator.yaml: field rejectHooks not found"
		}},
		{"NRI without a plugin", "nri-plugins", func(f *Facts) {
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"NRIPlugins", false, "NoPlugin",
				"NRI is on, and no plugin is connected"})
		}},
		{"a failed NRI plugin", "nri-plugins", func(f *Facts) {
			f.Daemon.Conditions = append(f.Daemon.Conditions, Condition{"NRIPlugins", false, "PluginFailed",
				"10-logger (disconnected after a failure)"})
		}},

		{"loopback down", "streaming", func(f *Facts) {
			f.Daemon.Streaming.Error, f.Daemon.Streaming.LoopbackDown = "network is unreachable", true
		}},
		{"streaming server blocked by a firewall", "streaming", func(f *Facts) {
			f.Daemon.Streaming.Error = "i/o timeout"
		}},
	}
}

func networkCases() []broken {
	none := func(f *Facts) {
		f.CNI = CNI{}
		f.Daemon.Conditions[1] = Condition{"NetworkReady", false, "NetworkPluginNotReady", "no CNI configuration"}
	}

	invalid := CNIFile{File: "/etc/cni/net.d/05-x.conflist", Error: "unexpected end of JSON input"}
	missing := func(plugin, at string) func(*Facts) {
		return func(f *Facts) {
			f.CNI.Missing = []string{plugin}
			if at != "" {
				f.CNI.Found = map[string]string{plugin: at}
			}
		}
	}

	return []broken{
		{"IP forwarding disabled", "ip-forward", func(f *Facts) { f.Node.IPForward = "0" }},
		{"no CNI, worker", "cni-config", none},
		{"no CNI, control plane", "cni-config", func(f *Facts) { none(f); f.Kubelet.Admin = true }},
		{"no CNI, no cluster", "cni-config", func(f *Facts) { none(f); f.Kubelet.Joined = false }},
		{"CNI configuration invalid", "cni-config", func(f *Facts) { none(f); f.CNI.Files = []CNIFile{invalid} }},
		{"CNI configuration invalid, no cluster", "cni-config", func(f *Facts) {
			none(f)
			f.CNI.Files, f.Kubelet.Joined = []CNIFile{invalid}, false
		}},
		{"one CNI configuration invalid", "cni-config", func(f *Facts) {
			f.CNI.Files = append([]CNIFile{invalid}, f.CNI.Files...)
		}},
		{"CNI directory not readable", "cni-config", func(f *Facts) { f.CNI = CNI{Error: "permission denied"} }},
		{"no-op network", "cni-config", func(f *Facts) {
			f.Flags.NetworkPlugin = ""
			f.Daemon.Conditions[1].Message = "the engine's own bridge"
		}},
		{"plugin in another directory", "cni-plugins", func(f *Facts) {
			f.Flags.CNIBinDirs = f.Flags.CNIBinDirs[:1]
			missing("bridge", "/usr/lib/cni/bridge")(f)
		}},
		{"plugin not installed", "cni-plugins", missing("bridge", "")},
		{"plugin not installed, without Debian's directory", "cni-plugins", func(f *Facts) {
			f.Flags.CNIBinDirs = f.Flags.CNIBinDirs[:1]
			missing("bridge", "")(f)
		}},
		{"plugin not installed, not Debian", "cni-plugins", func(f *Facts) {
			f.Debian = false
			missing("bridge", "")(f)
		}},
		{"plugin of an add-on", "cni-plugins", missing("flannel", "")},
		{"br_netfilter not loaded", "bridge-nf", func(f *Facts) { f.Node.BridgeNF = "" }},
		{"bridge-nf disabled", "bridge-nf", func(f *Facts) { f.Node.BridgeNF = "0" }},
		{"network not ready", "network-ready", func(f *Facts) {
			f.Daemon.Conditions[1] = Condition{"NetworkReady", false, "NetworkPluginNotReady", "STATUS"}
		}},
		{"kubenet without a pod CIDR", "network-ready", func(f *Facts) {
			f.Flags.NetworkPlugin, f.CNI = "kubenet", CNI{Bridge: true}
			f.Daemon.Conditions[1] = Condition{"NetworkReady", false, "NetworkPluginNotReady", "no pod CIDR"}
		}},
	}
}

func kubeletCases() []broken {
	return []broken{
		{"kubelet configuration invalid", "kubelet-config", func(f *Facts) {
			f.Kubelet.ConfigErr, f.Kubelet.Config = "yaml: line 3", KubeletConfig{}
		}},
		{"dockershim flags", "kubelet-flags", func(f *Facts) {
			f.Kubelet.Flags = []Flag{{"network-plugin", "cni", flagsEnv}, {"pod-infra-container-image", "pause:3.6",
				flagsEnv}}
		}},
		{"removed flag in the unit", "kubelet-flags", func(f *Facts) {
			f.Kubelet.Flags = []Flag{{"container-runtime", "remote", "/etc/systemd/system/kubelet.service.d/10.conf"}}
		}},
		{"removed flag without a file", "kubelet-flags", func(f *Facts) {
			f.Kubelet.Flags = []Flag{{"container-runtime", "remote", ""}}
		}},
		{"removed flag, version unknown", "kubelet-flags", func(f *Facts) {
			f.Kubelet.Flags, f.Kubelet.Version, f.Kubelet.Minor = []Flag{{"network-plugin", "cni", flagsEnv}}, "", 0
		}},

		{"kubelet uses containerd, set by flag", "kubelet-endpoint", func(f *Facts) {
			f.Kubelet.Flags = []Flag{{"container-runtime-endpoint", "unix:///run/containerd/containerd.sock", flagsEnv}}
		}},
		{"kubelet uses containerd, set in its configuration", "kubelet-endpoint", func(f *Facts) {
			f.Kubelet.Config.ContainerRuntimeEndpoint = "unix:///run/containerd/containerd.sock"
		}},
		{"kubelet uses containerd by default", "kubelet-endpoint", func(f *Facts) {
			f.Kubelet.Config.ContainerRuntimeEndpoint = ""
		}},
		{"old kubelet uses dockershim", "kubelet-endpoint", func(f *Facts) {
			f.Kubelet.Config.ContainerRuntimeEndpoint, f.Kubelet.Version, f.Kubelet.Minor = "", "v1.25.1", 25
			f.Kubelet.Config.CgroupDriver = "systemd"
		}},

		{"two CRI sockets before kubeadm init", "cri-sockets", func(f *Facts) {
			f.Kubelet = Kubelet{Present: true, Version: "v1.36.3", Minor: 36, Kubeadm: true}
		}},

		{"different cgroup drivers", "cgroup-driver", func(f *Facts) {
			f.Engine.CgroupDriver, f.Kubelet.Version, f.Kubelet.Minor = "cgroupfs", "v1.27.4", 27
		}},
		{"different cgroup drivers, set by flag", "cgroup-driver", func(f *Facts) {
			f.Kubelet.Version, f.Kubelet.Minor = "v1.27.4", 27
			f.Kubelet.Flags = []Flag{{"cgroup-driver", "cgroupfs", "/etc/systemd/system/kubelet.service.d/10.conf"}}
		}},
		{"cgroup v1", "cgroup-v1", func(f *Facts) { f.Node.CgroupV1 = true }},
		{"cgroup v1 before kubeadm init", "cgroup-v1", func(f *Facts) {
			f.Node.CgroupV1, f.Kubelet = true, Kubelet{Present: true, Version: "v1.36.3", Minor: 36}
		}},
		{"cgroup v1, set by flag", "cgroup-v1", func(f *Facts) {
			f.Node.CgroupV1, f.Kubelet.Minor, f.Kubelet.Version = true, 33, "v1.33.1"
			f.Kubelet.Flags = []Flag{{"fail-cgroupv1", "true", flagsEnv}}
		}},

		{"swap", "swap", func(f *Facts) { f.Node.Swaps = []string{"/swapfile"} }},
		{"swap before kubeadm init", "swap", func(f *Facts) {
			f.Kubelet = Kubelet{Present: true, Version: "v1.36.3", Minor: 36}
			f.Node.Swaps, f.Node.FstabSwap = []string{"/dev/sda2", "/swapfile"}, true
		}},
	}
}
