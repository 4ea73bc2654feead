package cluster

import (
	"strings"
	"testing"
)

// shopObjects has the workloads of shop.yaml.
var shopObjects = []string{
	"statefulset/store", "deployment/stock", "deployment/prices", "deployment/orders", "deployment/catalog",
	"deployment/front",
}

// testShop runs a web application with a front end, four services and a database. It uses the page
// at the node port of each node, orders, and restarts the database.
func (c *cluster) testShop(t *testing.T) {
	c.nodes[0].Run(t, "mkdir", "-p", "/var/lib/shop")
	c.apply(t, "shop.yaml")
	for _, o := range shopObjects {
		c.rollout(t, o)
	}

	c.awaitPage(t, "coffee: price 7, stock 100, orders 0\ntea: price 4, stock 100, orders 0\n")
	for range 3 {
		c.order(t, "tea")
	}

	c.awaitPage(t, "coffee: price 7, stock 100, orders 0\ntea: price 4, stock 97, orders 3\n")
	c.kubectl(t, "delete", "pod", "store-0", "--timeout", timeout.String())
	c.rollout(t, "statefulset/store")
	c.order(t, "coffee")
	c.awaitPage(t, "coffee: price 7, stock 99, orders 1\ntea: price 4, stock 97, orders 3\n")
}

// shopPort is the node port of the front end.
const shopPort = ":30001/"

// awaitPage waits until the page at each node has a text. The proxies of the nodes follow the
// readiness of pods with a delay.
func (c *cluster) awaitPage(t *testing.T, want string) {
	t.Helper()
	for _, n := range c.nodes {
		var got string
		var err error
		n.Await(t, timeout, "page of the shop", func() bool {
			got, err = c.nodes[0].Try("timeout", "10", "busybox", "wget", "-q", "-O", "-", "http://"+n.Address+shopPort)
			return err == nil
		})

		if got != want {
			t.Errorf("page at %s: got %q, want %q", n.Name, got, want)
		}
	}
}

// order orders a product once.
func (c *cluster) order(t *testing.T, product string) {
	t.Helper()
	var got string
	c.nodes[0].Await(t, timeout, "order", func() bool {
		var err error
		got, err = c.nodes[0].Try("timeout", "10", "busybox", "wget", "-q", "-O", "-", "--post-data=",
			"http://"+c.nodes[len(c.nodes)-1].Address+shopPort+"?product="+product)
		return err == nil
	})

	if strings.TrimSpace(got) != "thank you" {
		t.Errorf("order of %s: got %q", product, got)
	}
}
