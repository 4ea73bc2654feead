package cluster

import (
	"strings"
	"testing"

	"cri-dockerd/test/nodes"
)

// testServices connects to all pods: through their service, by name, and directly.
func (c *cluster) testServices(t *testing.T, pods []string) {
	ip := c.kubectl(t, "get", "service", "each", "-o", "jsonpath={.spec.clusterIP}")
	addresses := strings.Fields(c.kubectl(t, "get", "pod", "-l", "app=each", "-o", "jsonpath={.items[*].status.podIP}"))
	for _, p := range pods {
		c.testServiceFrom(t, p, ip)
		for _, a := range addresses {
			if got := c.fetchFrom(t, p, "http://"+a+":8080/"); !strings.Contains(c.names, got) || got == "" {
				t.Errorf("%s from %s: got %q", a, p, got)
			}
		}
	}

	for _, from := range c.nodes {
		urls := []string{"http://" + ip + "/"}
		for _, a := range addresses {
			urls = append(urls, "http://"+a+":8080/")
		}
		for _, to := range c.nodes {
			urls = append(urls, "http://"+to.Address+":30080/")
		}

		for _, url := range urls {
			if got := fetch(t, from, url); !strings.Contains(c.names, got) || got == "" {
				t.Errorf("%s from %s: got %q", url, from.Name, got)
			}
		}
	}
}

// testServiceFrom connects from a pod to all pods of the service, including the pod itself, and
// resolves names.
func (c *cluster) testServiceFrom(t *testing.T, pod, ip string) {
	got := c.kubectl(t, "exec", pod, "--", "sh", "-c",
		"for i in $(seq 40); do wget -q -O - http://each; done | sort -u")
	if got != c.names {
		t.Errorf("service from %s: got %q, want %q", pod, got, c.names)
	}

	for _, name := range []string{"each.default.svc.cluster.local", "kubernetes.default.svc.cluster.local"} {
		got := c.kubectl(t, "exec", pod, "--", "nslookup", name)
		want := ip
		if name != "each.default.svc.cluster.local" {
			want = "10.96.0.1"
		}
		if !strings.Contains(got, want) {
			t.Errorf("DNS lookup of %s from %s: no address %s in\n%s", name, pod, want, got)
		}
	}

	// a Service with one pod, which connects to itself
	hairpin := "hairpin-" + pod
	c.kubectl(t, "label", "pod", pod, "hairpin="+pod)
	c.kubectl(t, "create", "service", "clusterip", hairpin, "--tcp=80:8080")
	c.kubectl(t, "set", "selector", "service", hairpin, "hairpin="+pod)
	node := c.kubectl(t, "get", "pod", pod, "-o", "jsonpath={.spec.nodeName}")
	c.nodes[0].Await(t, timeout, "hairpin connection of "+pod, func() bool {
		got, err := c.nodes[0].Try("kubectl", kubeconfig, "exec", pod, "--", "timeout", "2", "wget", "-q", "-O", "-",
			"http://"+hairpin)
		return err == nil && got == node+"\n"
	})
}

// fetch returns a page requested from a node.
func fetch(t *testing.T, from *nodes.Node, url string) string {
	t.Helper()
	return from.Run(t, "timeout", "10", "busybox", "wget", "-q", "-O", "-", url)
}

// fetchFrom returns a page requested from a pod.
func (c *cluster) fetchFrom(t *testing.T, pod, url string) string {
	t.Helper()
	return c.kubectl(t, "exec", pod, "--", "timeout", "10", "wget", "-q", "-O", "-", url)
}
