package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// run injects a fault, waits until the node has healed, and returns a line of the report.
func (c *cluster) run(t *testing.T, n *nodes.Node, d drill) string {
	if d.after != nil {
		t.Cleanup(func() { d.after(t, c, n) })
	}

	c.awaitLoad(t)
	before, lines, begin := c.podsOn(t, n), len(c.lines(t)), time.Now().Truncate(time.Second)
	d.fault(t, c, n)
	if d.end != nil {
		d.end(t, c, n)
	}

	healed := c.awaitHealed(t, n, d, before)
	after, got := c.podsOn(t, n), c.counts(t)
	restarts, unready, failures := 0, []string(nil), 0
	for name, p := range after {
		restarts += p.restarts - before[name].restarts
		if !p.readySince.Before(begin) {
			unready = append(unready, name)
		}
	}

	line := fmt.Sprintf("%s | %s |", d.name, healed.Round(100*time.Millisecond))
	for _, target := range []string{"pod", "service", "nodeport"} {
		line += " " + got[target].String() + " |"
		failures += got[target].Failures
	}

	slices.Sort(unready)
	line += fmt.Sprintf(" %d | %s", restarts, strings.Join(unready, " "))
	t.Log(line)
	if !d.interrupts && (failures > 0 || len(unready) > 0) {
		t.Errorf("pods noticed the fault: %+v, unready %q", got, unready)
	}
	if !d.restarts && restarts > 0 {
		t.Errorf("%d containers restarted", restarts)
	}
	if !d.restarts && !d.replaces {
		c.assertLines(t, lines)
	}

	return line + "\n"
}

// awaitHealed waits until a new pod completes on the node, its pods are ready, and all requests of
// the client succeed. It returns the duration.
func (c *cluster) awaitHealed(t *testing.T, n *nodes.Node, d drill, before map[string]pod) time.Duration {
	t.Helper()
	begin := time.Now()
	name := fmt.Sprint("after-", begin.Unix())
	c.kubectl(t, "run", name, "--image="+engines.Busybox, "--image-pull-policy=Never", "--restart=Never",
		"--overrides", `{"spec": {"nodeName": "`+n.Name+`"}}`, "--", "true")
	state := ""
	healed := engines.Within(d.bound, func() bool {
		state = c.jsonpath(t, "{.status.phase}", "pod", name)
		if state != "Succeeded" {
			return false
		}

		restarted := false
		for name, p := range c.podsOn(t, n) {
			restarted = restarted || p.restarts > before[name].restarts
			if !p.ready {
				state = name + " is not ready"
				return false
			}
		}

		for target, counts := range c.counts(t) {
			if counts.Failing {
				state = "requests to " + target + " fail: " + counts.Error
				return false
			}
		}

		return restarted || !d.restarts
	})
	if !healed {
		t.Fatalf("%s has not healed after %s: new pod %s", n.Name, d.bound, state)
	}

	took := time.Since(begin)
	c.kubectl(t, "delete", "pod", name, "--timeout", timeout.String())

	return took
}

// String returns the failures, and the longest outage if there are any.
func (c counts) String() string {
	if c.Failures == 0 {
		return fmt.Sprintf("0 of %d", c.Requests)
	}
	return fmt.Sprintf("%d of %d (%s)", c.Failures, c.Requests, c.Outage.Round(100*time.Millisecond))
}

// awaitLoad waits for two seconds of successful requests to all targets.
func (c *cluster) awaitLoad(t *testing.T) {
	t.Helper()
	c.resetCounts(t)
	c.nodes[0].Await(t, timeout, "successful requests of the client", func() bool {
		for _, got := range c.counts(t) {
			if got.Failures > 0 {
				c.resetCounts(t)
				return false
			}
			if got.Requests < 40 {
				return false
			}
		}

		return true
	})
}

// pod is the state of a pod.
type pod struct {
	restarts   int // of all its containers
	ready      bool
	readySince time.Time
}

// podsOn returns the running pods of a node, by name.
func (c *cluster) podsOn(t *testing.T, n *nodes.Node) map[string]pod {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Phase             string
				Conditions        []struct{ Type, Status, LastTransitionTime string }
				ContainerStatuses []struct{ RestartCount int }
			}
		}
	}

	out := c.kubectl(t, "get", "pod", "-A", "--field-selector=spec.nodeName="+n.Name, "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("pods of %s: %v", n.Name, err)
	}

	pods := map[string]pod{}
	for _, i := range list.Items {
		if i.Status.Phase == "Succeeded" || i.Status.Phase == "Failed" {
			continue
		}

		var p pod
		for _, s := range i.Status.ContainerStatuses {
			p.restarts += s.RestartCount
		}
		for _, cond := range i.Status.Conditions {
			if cond.Type == "Ready" {
				p.ready = cond.Status == "True"
				p.readySince, _ = time.Parse(time.RFC3339, cond.LastTransitionTime)
			}
		}

		pods[i.Metadata.Name] = p
	}

	return pods
}

// lines returns the log of the container with numbered lines.
func (c *cluster) lines(t *testing.T) []string {
	t.Helper()
	return strings.Split(strings.TrimSpace(c.kubectl(t, "logs", "deployment/victim", "-c", "lines")), "\n")
}

// assertLines checks that no line is missing, and that there are newer lines than before.
func (c *cluster) assertLines(t *testing.T, before int) {
	t.Helper()
	lines := c.lines(t)
	for i, line := range lines {
		if want := fmt.Sprint("line ", i+1); line != want {
			t.Errorf("log of the container: got %q, want %q", line, want)
			return
		}
	}

	if len(lines) <= before {
		t.Errorf("no line in the log since the fault, %d before", before)
	}
}
