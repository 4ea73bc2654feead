package conformance

import (
	"path/filepath"
	"slices"
	"testing"

	"cri-dockerd/test/engines"
	systemd "cri-dockerd/test/nodes"
)

// Units and drop-ins of a kubelet.
const (
	kubeletService = "[Service]\nExecStart=/usr/bin/kubelet\nRestart=always\nRestartSec=1\n[Install]\n" +
		"WantedBy=multi-user.target\n"
	kubeletDropIn = "[Service]\nEnvironment=KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml\n" +
		"EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env\n" +
		"ExecStart=\nExecStart=/usr/bin/kubelet $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS\n"
)

// serviceFaults returns faults caused and fixed with systemctl. The first two are those of a newly
// installed node.
func serviceFaults() []fault {
	return []fault{
		{name: "no CNI", id: "cni-config", status: "fail", othersRemain: true},
		{name: "no live-restore", id: "live-restore", status: "warn"},
		{name: "engine down", id: "engine", status: "fail", breakIt: "systemctl stop docker.socket docker.service"},
		{
			name:   "engine down because of daemon.json",
			id:     "engine-config",
			status: "fail",
			manual: true,
			breakIt: "cp /etc/docker/daemon.json /run/ && echo '{' > /etc/docker/daemon.json && " +
				"systemctl stop docker.socket && ! systemctl restart docker.service",
			restore: "cp /run/daemon.json /etc/docker/ && systemctl reset-failed docker.service && " +
				"systemctl start docker.service",
		},
		{
			name:    "daemon down",
			id:      "daemon",
			status:  "fail",
			breakIt: "systemctl stop cri-docker.socket cri-docker.service",
		},
		{
			name:   "daemon down because of a flag",
			id:     "daemon-flags",
			status: "fail",
			breakIt: "echo CRI_DOCKERD_OPTS=--network-plugn=cni > /etc/default/cri-docker && " +
				"! systemctl restart cri-docker.service",
			restore: "grep -qx CRI_DOCKERD_OPTS=--network-plugin=cni /etc/default/cri-docker && " +
				"rm /etc/default/cri-docker && systemctl restart cri-docker.service",
		},
		{
			name:    "daemon hangs",
			id:      "daemon",
			status:  "fail",
			breakIt: hang("systemctl show -P MainPID cri-docker.service"),
		},
		{
			name:    "log-driver hangs",
			id:      "log-driver",
			status:  "fail",
			breakIt: hang("systemctl show -P MainPID cri-docker-log.service"),
		},
		{
			name:   "no group docker",
			id:     "docker-group",
			status: "fail",
			breakIt: "systemctl stop cri-docker.socket cri-docker.service && groupdel docker && " +
				"! systemctl start cri-docker.socket",
			restore: "systemctl reset-failed cri-docker.socket && systemctl start cri-docker.service && " +
				"chown root:docker /run/docker.sock",
		},
		{
			name:    "not enabled",
			id:      "service-enabled",
			status:  "warn",
			breakIt: "systemctl disable cri-docker.service cri-docker.socket",
		},
		{
			name:   "unit of an older shim",
			id:     "one-daemon",
			status: "warn",
			breakIt: "cp /usr/lib/systemd/system/cri-docker.service /etc/systemd/system/cri-dockerd.service && " +
				"sed -i /^Also=/d /etc/systemd/system/cri-dockerd.service && systemctl enable cri-dockerd.service",
		},
	}
}

// kubeletServiceFaults returns faults of the kubelet's unit.
func kubeletServiceFaults() []fault {
	const dropIn = "/etc/systemd/system/kubelet.service.d/20-old.conf"

	return []fault{
		{
			name:   "removed kubelet flag",
			id:     "kubelet-flags",
			status: "fail",
			breakIt: `echo 'KUBELET_KUBEADM_ARGS="--network-plugin=cni --v=2"' > /var/lib/kubelet/kubeadm-flags.env ` +
				`&& systemctl restart kubelet`,
			restore: "systemctl is-active kubelet",
		},
		{
			name:   "removed kubelet flag of a drop-in",
			id:     "kubelet-flags",
			status: "fail",
			breakIt: `printf '[Service]\nExecStart=\nExecStart=/usr/bin/kubelet --network-plugin cni ` +
				`$KUBELET_CONFIG_ARGS\n' > ` + dropIn + " && systemctl daemon-reload && systemctl restart kubelet",
			restore: "systemctl is-active kubelet && rm " + dropIn,
		},
	}
}

// TestBrokenServices breaks the services of a node with systemd. check reports the cause first, and
// its fix works.
func TestBrokenServices(t *testing.T) {
	t.Parallel()
	n := systemd.Start(t, systemd.Config{Files: map[string]string{
		"/etc/systemd/system/kubelet.service":                   kubeletService,
		"/etc/systemd/system/kubelet.service.d/10-kubeadm.conf": kubeletDropIn,
		"/var/lib/kubelet/config.yaml": "kind: KubeletConfiguration\nfailCgroupV1: false\n" +
			"failSwapOn: false\ncontainerRuntimeEndpoint: unix:///run/cri-dockerd.sock\n",
	}})

	engines.ShareLimits(t)
	p := &checkedNode{command: n.Command, program: "/usr/bin/cri-dockerd"}
	program := filepath.Join(t.TempDir(), "cri-dockerd")
	engines.Build(t, program, "cri-dockerd/cmd/cri-dockerd", "", false)
	n.Copy(t, program, p.program)
	kubelet := filepath.Join(t.TempDir(), "kubelet")
	engines.BuildKubelet(t, kubelet, "v1.36.3")
	n.Copy(t, kubelet, "/usr/bin/kubelet")
	units, err := filepath.Glob("../../deploy/systemd/cri-docker*")
	if err != nil || len(units) != 4 {
		t.Fatalf("units %v, %v", units, err)
	}

	for _, u := range units {
		n.Copy(t, u, "/usr/lib/systemd/system/"+filepath.Base(u))
	}

	p.sh(t, "systemctl daemon-reload && systemctl enable --now cri-docker.service cri-docker.socket kubelet.service")
	for _, f := range p.check(t) {
		if f.Status == "warn" && f.ID != "live-restore" || f.Status == "fail" && f.ID != "cni-config" {
			p.baseline = append(p.baseline, f.ID)
		}
		if f.Status == "fail" && f.ID != "cni-config" {
			t.Fatalf("check of a newly installed node fails: %+v", f)
		}
	}

	t.Logf("warnings of this machine: %v", p.baseline)
	for _, f := range slices.Concat(serviceFaults(), kubeletServiceFaults()) {
		p.breakAndFix(t, f)
	}

	p.sh(t, "cri-dockerd check --pod")
}
