// Command nodeconformance runs the node suite of Kubernetes against the daemon on a test node.
// hack/kubernetes.sh e2e-node builds the suite. Focus and skip are regular expressions for the full
// names of tests. A run that was cut continues with -resume.
package main

import (
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/suite"
)

// metrics matches the tests of usage metrics without changes of the whole node.
const metrics = `Summary API.*should report resource usage|ContainerMetrics|ResourceMetricsAPI`

// kubelet is the base configuration of the suite. With Docker, the kubelet reports networks and
// processes of pods, and containers in /metrics/cadvisor, only with PodAndContainerStatsFromCRI.
// The suite does not learn of the gate, because it would skip the tests of these metrics.
const kubelet = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
featureGates: {PodAndContainerStatsFromCRI: CRI_STATS}
cgroupDriver: systemd
failCgroupV1: false
failSwapOn: false
resolvConf: /etc/resolv.conf
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "100Mi", nodefs.available: "1%", nodefs.inodesFree: "1%"}
`

// engine is the configuration of the engine. The suite expects a runtime handler of this name.
const engine = `{"exec-opts": ["native.cgroupdriver=systemd"], "runtimes": {"test-handler": {"path": "runc"}}}
`

// accountScript enables CPU accounting of Docker if cpu and cpuacct are separate hierarchies.
// systemd does not manage cpuacct.
const accountScript = `group=/sys/fs/cgroup/cpuacct/system.slice/docker.service
[ -L /sys/fs/cgroup/cpuacct ] || [ ! -d /sys/fs/cgroup/cpuacct ] || { mkdir -p $group && cat /run/docker.pid > $group/cgroup.procs; }`

// sudoScript installs a sudo for root. The serial tests restart the kubelet with it.
const sudoScript = `printf '#!/bin/sh\nexec "$@"\n' > /usr/local/bin/sudo && chmod 755 /usr/local/bin/sudo`

const network = `{"cniVersion": "1.0.0", "name": "test", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`

// options are the flags of this program.
type options struct {
	focus, skip, engine, report string
	procs                       int
	timeout                     time.Duration
	criStats, resume            bool
}

func main() {
	var o options
	flag.StringVar(&o.focus, "focus", metrics, "tests to run")
	flag.StringVar(&o.skip, "skip", `\[Flaky\]|\[Serial\]|\[Slow\]`, "tests to skip")
	flag.IntVar(&o.procs, "procs", 1, "number of parallel processes")
	flag.DurationVar(&o.timeout, "timeout", 4*time.Hour, "timeout of the suite")
	flag.StringVar(&o.engine, "engine", string(engines.V20), "version of Docker Engine, 20.10 or 29")
	flag.BoolVar(&o.criStats, "cri-stats", true, "enable the kubelet's gate PodAndContainerStatsFromCRI")
	flag.StringVar(&o.report, "report", "", "directory of results, reports and logs (default: in the cache)")
	flag.BoolVar(&o.resume, "resume", false, "skip the tests that passed in the earlier runs of this directory")
	flag.Parse()

	h := &engines.Program{}
	failed := run(h, o)
	h.End()
	if failed {
		os.Exit(1)
	}
}

// run starts the node and runs the suite with the output of this program. It reports whether a test
// failed.
func run(h *engines.Program, o options) bool {
	stats := "cadvisor"
	if o.criStats {
		stats = "cri"
	}

	name := "e2e-node-" + engines.KubernetesVersion(h) + "-" + o.engine + "-" + stats
	report := suite.NewReport(h, o.report, name, o.resume)
	w := nodes.NewNetwork(h)
	n := startNode(h, o, w, report)
	suite.LoadImages(h, n, "e2e-node")
	createTraffic(h, w, n)
	n.Run(h, "sh", "-ec", accountScript)
	n.Run(h, "sh", "-ec", sudoScript)
	err := suite.Run{
		Program: "e2e_node.test",
		Focus:   o.focus,
		Exclude: o.skip,
		Procs:   o.procs,
		Timeout: o.timeout,
		Flags: []string{
			"--node-name=" + n.Name, "--container-runtime-endpoint=" + nodes.Endpoint,
			"--container-runtime-process-name=dockerd", "--container-runtime-pid-file=/run/docker.pid",
			"--kubelet-config-file=/etc/kubelet.yaml", "--prepull-images=false", "--server-start-timeout=180s",
			"--kubelet-flags=--hostname-override=" + n.Name + " --node-ip=" + n.Address +
				" --runtime-cgroups=/system.slice/docker.service",
		},
	}.On(n)
	if err != nil {
		h.Logf("%v", err)
	}

	results := report.Results(h)
	h.Logf("results in %s: %v", report, results)

	return err != nil || len(results.Failures) > 0
}

// startNode starts the node of the suite.
func startNode(h *engines.Program, o options, w *nodes.Network, report suite.Report) *nodes.Node {
	config := strings.ReplaceAll(kubelet, "CRI_STATS", strconv.FormatBool(o.criStats))
	c := nodes.Config{
		Network: w,
		Engine:  engines.Version(o.engine),
		Files: map[string]string{
			"/etc/docker/daemon.json":         engine,
			"/etc/kubelet.yaml":               config,
			"/etc/cni/net.d/10-test.conflist": network,
		},
	}

	suite.Configure(h, &c, report, suite.Serve(h, w), "e2e-node", "e2e_node.test")
	c.Binds["/opt/kubernetes/kubelet"] = engines.KubernetesProgram(h, "kubelet", "kubelet")
	for _, p := range []string{"bridge", "host-local", "loopback", "portmap"} {
		c.Binds["/opt/cni/bin/"+p] = filepath.Join(engines.Plugins(), p)
	}

	return nodes.StartWithDaemon(h, c)
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
