// Command nodeconformance runs the node conformance suite of Kubernetes against the daemon on a
// test node. hack/kubernetes.sh e2e-node builds the suite. Focus and skip are regular expressions
// for the full names of tests.
package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

const (
	version = "v1.36.3"

	// metrics matches the tests of usage metrics without changes of the whole node.
	metrics = `Summary API.*should report resource usage|ContainerMetrics|ResourceMetricsAPI`
)

// kubelet is the base configuration of the suite. With Docker, the kubelet reports networks and
// processes of pods, and containers in /metrics/cadvisor, only with PodAndContainerStatsFromCRI.
const kubelet = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
featureGates: {PodAndContainerStatsFromCRI: true}
cgroupDriver: systemd
failCgroupV1: false
failSwapOn: false
resolvConf: /etc/resolv.conf
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "100Mi", nodefs.available: "1%", nodefs.inodesFree: "1%"}
`

// accountScript enables CPU accounting of Docker if cpu and cpuacct are separate hierarchies.
// systemd does not manage cpuacct.
const accountScript = `group=/sys/fs/cgroup/cpuacct/system.slice/docker.service
[ -L /sys/fs/cgroup/cpuacct ] || [ ! -d /sys/fs/cgroup/cpuacct ] || { mkdir -p $group && cat /run/docker.pid > $group/cgroup.procs; }`

const network = `{"cniVersion": "1.0.0", "name": "test", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`

func main() {
	focus := flag.String("focus", metrics, "tests to run")
	skip := flag.String("skip", `\[Flaky\]|\[Serial\]|\[Slow\]`, "tests to skip")
	procs := flag.Int("procs", 1, "number of parallel processes")
	report := flag.String("report", "", "directory for the reports and logs of the suite")
	flag.Parse()
	h := &engines.Program{}
	failed := run(h, *focus, *skip, *procs, *report)
	h.End()
	if failed {
		os.Exit(1)
	}
}

// run starts the node and runs the suite with the output of this program. It reports whether the
// suite failed.
func run(h *engines.Program, focus, skip string, procs int, report string) bool {
	built := filepath.Join(engines.Cache(), "kubernetes-"+version)
	w := nodes.NewNetwork(h)
	authority := startServers(h, w)
	c := nodes.Config{
		Network: w,
		Driver:  "systemd",
		Hosts:   map[string]string{registryName: nodes.Gateway},
		Binds:   map[string]string{},
		Files: map[string]string{
			"/etc/kubelet.yaml":                               kubelet,
			"/etc/cni/net.d/10-test.conflist":                 network,
			"/etc/docker/certs.d/" + registryName + "/ca.crt": authority,
		},
	}

	for _, b := range []string{"e2e_node.test", "kubelet", "ginkgo"} {
		if _, err := os.Stat(filepath.Join(built, b)); err != nil {
			h.Fatalf("the suite is not built; run hack/kubernetes.sh kubelet e2e-node: %v", err)
		}
		c.Binds["/opt/kubernetes/"+b] = filepath.Join(built, b)
	}

	for _, p := range []string{"bridge", "host-local", "loopback", "portmap"} {
		c.Binds["/opt/cni/bin/"+p] = filepath.Join(engines.Plugins(), p)
	}

	if report != "" {
		if err := os.MkdirAll(report, 0o755); err != nil {
			h.Fatalf("report: %v", err)
		}

		dir, err := filepath.Abs(report)
		if err != nil {
			h.Fatalf("report: %v", err)
		}

		c.Binds["/report"] = dir
	}

	n := nodes.StartWithDaemon(h, c)
	n.Run(h, "mkdir", "-p", "/report")
	loadImages(h, n, built)
	createTraffic(h, w, n)
	n.Run(h, "sh", "-ec", accountScript)
	suite := []string{
		fmt.Sprint("--procs=", procs), "--no-color", "--timeout=2h", "--focus=" + focus, "--skip=" + skip,
		"/opt/kubernetes/e2e_node.test", "--",
		"--node-name=" + n.Name, "--k8s-bin-dir=/opt/kubernetes", "--container-runtime-endpoint=" + nodes.Endpoint,
		"--container-runtime-process-name=dockerd", "--container-runtime-pid-file=/run/docker.pid",
		"--kubelet-config-file=/etc/kubelet.yaml",
		"--kubelet-flags=--hostname-override=" + n.Name + " --node-ip=" + n.Address +
			" --runtime-cgroups=/system.slice/docker.service", "--prepull-images=false", "--report-dir=/report",
		"--server-start-timeout=180s",
	}

	script := `cd /report && PATH=/opt/kubernetes:$PATH exec /opt/kubernetes/ginkgo "$@"`
	cmd := n.Command("sh", append([]string{"-c", script, "sh"}, suite...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		h.Logf("%s: %v", strings.Join(suite, " "), err)
		return true
	}

	return false
}

// createTraffic sends data through the node's interface. The suite expects the traffic of image
// pulls in the metrics of the interface.
func createTraffic(h *engines.Program, w *nodes.Network, n *nodes.Node) {
	var l net.Listener
	if err := engines.In(w.NetNS(), func() (err error) {
		l, err = net.Listen("tcp", nodes.Gateway+":80")
		return err
	}); err != nil {
		h.Fatalf("traffic: %v", err)
	}

	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if _, err := io.Copy(w, q.Body); err != nil {
			h.Logf("traffic: %v", err)
		}
	})}

	h.Cleanup(func() { _ = s.Close() })
	go func() { _ = s.Serve(l) }()
	n.Run(h, "sh", "-c", "head -c 4000000 /dev/zero | curl -sS --data-binary @- -o /dev/null http://"+nodes.Gateway)
}
