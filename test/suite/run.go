package suite

import (
	"cmp"
	"fmt"
	"os"
	"strings"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// directory has the programs of a suite in a node.
const directory = "/opt/kubernetes/"

// Configure adds the programs of a suite, its report and its registry to the configuration of a
// node. set is the argument of hack/kubernetes.sh that builds the programs, and authority the
// result of Serve.
func Configure(tb engines.TB, c *nodes.Config, report Report, authority, set string, programs ...string) {
	tb.Helper()
	add := func(m *map[string]string, key, value string) {
		if *m == nil {
			*m = map[string]string{}
		}
		(*m)[key] = value
	}

	add(&c.Hosts, RegistryName, nodes.Gateway)
	add(&c.Files, "/etc/docker/certs.d/"+RegistryName+"/ca.crt", authority)
	add(&c.Binds, "/report", string(report))
	for _, p := range append([]string{"ginkgo"}, programs...) {
		add(&c.Binds, directory+p, engines.KubernetesProgram(tb, set, p))
	}
}

// Run is a run of a suite.
type Run struct {
	Program string // e2e_node.test or e2e.test
	Focus   string // regular expression of the tests to run
	Exclude string // regular expression of the tests not to run
	Procs   int    // number of parallel processes
	Shard   string // "1/4" runs the first of four parts, "" all tests
	Timeout time.Duration
	Flags   []string // of the suite
}

// On runs the suite on a configured node. Its output goes to standard output.
func (r Run) On(n *nodes.Node) error {
	args := []string{
		"-c", "cd /report && exec env PROGRESS=/report/" + progressFile + " SHARD=" + cmp.Or(r.Shard, "1/1") +
			" PATH=" + directory + `:"$PATH" ` + directory + `ginkgo "$@"`,
		"sh", fmt.Sprint("--procs=", r.Procs), "--no-color", "--timeout=" + r.Timeout.String(), "--focus=" + r.Focus,
		"--skip=" + r.Exclude, directory + r.Program, "--", "--report-dir=/report",
	}

	cmd := n.Command("sh", append(args, r.Flags...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}

	return nil
}
