package cluster

import (
	"cmp"
	"flag"
	"fmt"
	"testing"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/suite"
)

// The set of hack/kubernetes.sh with Kubernetes' suite for clusters, and its program.
const (
	suiteSet     = "e2e"
	suiteProgram = "e2e.test"
)

var (
	exclude = flag.String("exclude", "", "tests of Kubernetes' suite not to run, a regular expression of their names")
	procs   = flag.Int("procs", 1, "number of parallel processes of Kubernetes' suite")
	shard   = flag.String("shard", "", "part of Kubernetes' suite, for example 1/4 (default: all)")
	resume  = flag.Bool("resume", false, "skip the tests of Kubernetes' suite that passed in earlier runs")
)

// kubernetesSuite is what the nodes need for Kubernetes' suite.
type kubernetesSuite struct {
	report    suite.Report
	authority string // certificate of the registry's authority
}

// newSuite starts the registry of the suite's images and creates its report in the cache.
func newSuite(t *testing.T, w *nodes.Network) *kubernetesSuite {
	t.Helper()
	name := fmt.Sprint("e2e-", engines.KubernetesVersion(t), "-", engine(), "-", *cni)
	return &kubernetesSuite{suite.NewReport(t, "", name, *resume), suite.Serve(t, w)}
}

// testSuite runs Kubernetes' suite on the control plane. The other nodes pull its images.
func (c *cluster) testSuite(t *testing.T) {
	c.kubectl(t, "delete", "-n", "default", "daemonset", "--all", "--timeout", timeout.String(), "--cascade=foreground")
	for _, n := range c.nodes { // kubeadm's pause has no program
		n.Run(t, "sh", "-c", "docker rmi -f $(docker images -q "+suite.RegistryName+"/pause)")
	}

	suite.LoadImages(t, c.nodes[0], suiteSet)
	err := suite.Run{
		Program: suiteProgram,
		Focus:   *focus,
		Exclude: *exclude,
		Procs:   *procs,
		Shard:   *shard,
		Timeout: 6 * time.Hour,
		Flags:   []string{kubeconfig, "--provider=skeleton", "--disable-log-dump"},
	}.On(c.nodes[0])

	results := c.suite.report.Results(t)
	t.Logf("shard %s, results in %s: %v", cmp.Or(*shard, "1/1"), c.suite.report, results)
	if err != nil || len(results.Failures) > 0 {
		t.Errorf("Kubernetes' suite: %v", err)
	}
}
