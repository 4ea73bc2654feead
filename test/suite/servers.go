package suite

import (
	"net"

	"golang.org/x/net/dns/dnsmessage"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/registry"
)

// Serve starts the servers of the node's network: a registry with the name of the suite's
// registry, and a name server without any names, to avoid timeouts of lookups. It returns the
// certificate of the registry's authority.
func Serve(tb engines.TB, w *nodes.Network) (authority string) {
	tb.Helper()
	var l net.Listener
	var dns net.PacketConn
	err := engines.In(w.NetNS(), func() (err error) {
		if l, err = net.Listen("tcp", nodes.Gateway+":443"); err == nil {
			dns, err = net.ListenPacket("udp", nodes.Gateway+":53")
		}
		return err
	})
	if err != nil {
		tb.Fatalf("network: %v", err)
	}

	tb.Cleanup(func() { _ = dns.Close() })
	go serveDNS(dns)
	_, certificate := registry.ServeTLS(tb, l, RegistryName)

	return string(certificate)
}

// serveDNS responds with a name error to every query (RFC 1035) until the connection is closed.
func serveDNS(c net.PacketConn) {
	var b [512]byte
	for {
		n, from, err := c.ReadFrom(b[:])
		if err != nil {
			return
		}

		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil {
			continue
		}

		m.Header = dnsmessage.Header{
			ID:                 m.ID,
			Response:           true,
			RecursionDesired:   m.RecursionDesired,
			RecursionAvailable: true,
			RCode:              dnsmessage.RCodeNameError,
		}

		m.Answers, m.Authorities, m.Additionals = nil, nil, nil
		if response, err := m.Pack(); err == nil {
			_, _ = c.WriteTo(response, from)
		}
	}
}
