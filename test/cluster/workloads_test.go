package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// hpaTimeout allows some intervals of the autoscaler (15 s) and of metrics-server.
const hpaTimeout = 4 * time.Minute

// testWorkloads uses the controllers of workloads.
func (c *cluster) testWorkloads(t *testing.T) {
	c.apply(t, "workloads.yaml")
	t.Run("Job", c.testJob)
	t.Run("rolling update", c.testRollingUpdate)
	t.Run("DaemonSet", c.testDaemonSet)
	t.Run("StatefulSet", c.testStatefulSet)
	t.Run("HorizontalPodAutoscaler", c.testAutoscaler)
}

// rollout waits for the end of a rollout.
func (c *cluster) rollout(t *testing.T, object string) {
	t.Helper()
	c.kubectl(t, "rollout", "status", object, "--timeout", timeout.String())
}

// jsonpath returns a field of objects.
func (c *cluster) jsonpath(t *testing.T, path string, args ...string) string {
	t.Helper()
	return c.kubectl(t, append(append([]string{"get"}, args...), "-o", "jsonpath="+path)...)
}

// testJob waits for an indexed job. One index fails once.
func (c *cluster) testJob(t *testing.T) {
	c.kubectl(t, "wait", "--for=condition=Complete", "job/job", "--timeout", timeout.String())
	if got := c.jsonpath(t, "{.status.succeeded} {.status.failed}", "job", "job"); got != "4 1" {
		t.Errorf("succeeded and failed pods of the job: got %q, want 4 1", got)
	}

	logs := strings.Split(strings.TrimSpace(c.kubectl(t, "logs", "-l", "job-name=job", "--tail=-1")), "\n")
	slices.Sort(logs)
	if want := []string{"done 0", "done 1", "done 2", "done 3"}; !slices.Equal(logs, want) {
		t.Errorf("logs of the job: got %q, want %q", logs, want)
	}
}

// testRollingUpdate updates and reverts a deployment. No request of a client may fail.
func (c *cluster) testRollingUpdate(t *testing.T) {
	c.rollout(t, "deployment/rolling")
	c.kubectl(t, "wait", "--for=condition=Ready", "pod/client", "--timeout", timeout.String())
	c.nodes[0].Await(t, timeout, "requests of the client", func() bool { return c.counts(t)["rolling"].Requests > 20 })
	c.resetCounts(t)
	for _, step := range []struct{ command, version string }{
		{"kubectl set env deployment/rolling VERSION=2", "2"},
		{"kubectl rollout undo deployment/rolling", "1"},
	} {
		c.sh(t, step.command)
		c.rollout(t, "deployment/rolling")
		ip := c.jsonpath(t, "{.spec.clusterIP}", "service", "rolling")
		c.nodes[0].Await(t, timeout, "version "+step.version+" on all pages", func() bool {
			for range 20 { // the proxy removes the last old pod after a moment
				page := fetch(t, c.nodes[0], "http://"+ip+"/")
				if strings.Fields(page)[1] != strconv.Quote(step.version) {
					return false
				}
			}
			return true
		})
	}

	if got := c.counts(t)["rolling"]; got.Failures != 0 || got.Requests < 100 {
		t.Errorf("requests during the updates: %+v", got)
	}
}

// testDaemonSet updates a DaemonSet, which replaces the pod of each node.
func (c *cluster) testDaemonSet(t *testing.T) {
	before := c.jsonpath(t, "{.items[*].metadata.name}", "pod", "-l", "app=each")
	c.sh(t, "kubectl set env daemonset/each UPDATED=1")
	c.rollout(t, "daemonset/each")
	names := strings.Fields(c.jsonpath(t, "{.items[*].spec.nodeName}", "pod", "-l", "app=each"))
	slices.Sort(names)
	if got := strings.Join(names, "\n") + "\n"; got != c.names {
		t.Errorf("nodes with a pod: got %q, want %q", got, c.names)
	}

	for _, p := range strings.Fields(c.jsonpath(t, "{.items[*].metadata.name}", "pod", "-l", "app=each")) {
		if strings.Contains(before, p) {
			t.Errorf("pod %s is older than the update", p)
		}
	}
}

// testStatefulSet checks the identity of the pods of a StatefulSet.
func (c *cluster) testStatefulSet(t *testing.T) {
	c.rollout(t, "statefulset/ordered")
	c.kubectl(t, "delete", "pod", "ordered-1", "--timeout", timeout.String())
	c.rollout(t, "statefulset/ordered")
	each := strings.Fields(c.jsonpath(t, "{.items[*].metadata.name}", "pod", "-l", "app=each"))[0]
	for i := range 3 {
		name := fmt.Sprint("ordered-", i)
		c.nodes[0].Await(t, timeout, "DNS record of "+name, func() bool {
			out, err := c.nodes[0].Try("kubectl", kubeconfig, "exec", each, "--", "timeout", "5", "wget", "-q",
				"-O", "-", "http://"+name+".ordered:8080/")
			return err == nil && strings.HasPrefix(out, name+" ")
		})
	}
}

// testAutoscaler loads a deployment until the autoscaler adds pods, and ends the load until it
// removes them.
func (c *cluster) testAutoscaler(t *testing.T) {
	c.rollout(t, "deployment/scaled")
	replicas := func() string { return c.jsonpath(t, "{.status.readyReplicas}", "deployment", "scaled") }
	c.kubectl(t, "run", "load", "--image=cri-test/shop", "--image-pull-policy=Never", "--", "client",
		"scaled=http://scaled/?burn=5ms")
	c.nodes[0].Await(t, hpaTimeout, "more pods under load", func() bool { return replicas() == "3" })
	c.kubectl(t, "delete", "pod", "load", "--timeout", timeout.String())
	c.nodes[0].Await(t, hpaTimeout, "fewer pods without load", func() bool { return replicas() == "1" })
}

// counts are the results of the requests to a target of a client.
type counts struct {
	Requests int
	Failures int
	Outage   time.Duration // longest time from the first failure to the next success
	Error    string        // of the last failure
	Failing  bool          // the last request failed
}

// counts returns the results of the pod "client", by target.
func (c *cluster) counts(t *testing.T) map[string]counts {
	t.Helper()
	address := c.jsonpath(t, "{.status.podIP}", "pod", "client")
	out := fetch(t, c.nodes[0], "http://"+address+":8080/")
	var result map[string]counts
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatalf("counts of the client: %v: %q", err, out)
	}

	return result
}

// resetCounts sets the results of the pod "client" to zero.
func (c *cluster) resetCounts(t *testing.T) {
	t.Helper()
	address := c.jsonpath(t, "{.status.podIP}", "pod", "client")
	c.nodes[0].Run(t, "timeout", "10", "busybox", "wget", "-q", "-O", "-", "--post-data=", "http://"+address+":8080/")
}

// loadShop creates the image of the program in the directory shop.
func loadShop(t *testing.T, n *nodes.Node) {
	t.Helper()
	i := newImage(t)
	file := t.TempDir() + "/shop"
	engines.Build(t, file, "cri-dockerd/test/cluster/shop", "", false)
	i.add("/shop", file)
	engines.Import(t, n.Path("/run/docker.sock"), "cri-test/shop:latest", i.files, `ENTRYPOINT ["/shop"]`)
}
