// Command coredns is CoreDNS with the plugins of a kubeadm cluster. The original program has some
// thirty more plugins, and their dependencies take longer to build than all of Kubernetes.
package main

import (
	"slices"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

func main() {
	if !slices.Contains(dnsserver.Directives, "kubernetes") {
		dnsserver.Directives = []string{
			"reload", "ready", "health", "prometheus", "errors", "cache", "loadbalance", "loop", "kubernetes",
			"forward",
		}
	}
	coremain.Run()
}
