package main

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// serve runs a name server that knows one service and one alias, over UDP and TCP.
func serve(t *testing.T) *dns.ClientConfig {
	t.Helper()
	zone := map[string]string{
		"web.default.svc.cluster.local.":   "web.default.svc.cluster.local. 5 IN A 10.96.0.7",
		"alias.default.svc.cluster.local.": "alias.default.svc.cluster.local. 5 IN CNAME other.example.com.",
		"7.0.96.10.in-addr.arpa.":          "7.0.96.10.in-addr.arpa. 5 IN PTR web.default.svc.cluster.local.",
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if text, ok := zone[q.Question[0].Name]; ok && q.Question[0].Qtype != dns.TypeAAAA {
			r, err := dns.NewRR(text)
			if err != nil {
				t.Error(err)
			}
			m.Answer = append(m.Answer, r)
		}
		if err := w.WriteMsg(m); err != nil {
			t.Error(err)
		}
	})

	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}

	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler}, {Listener: tcp, Handler: handler}} {
		go func() { _ = s.ActivateAndServe() }()
		t.Cleanup(func() { _ = s.Shutdown() })
	}

	_, port, _ := net.SplitHostPort(udp.LocalAddr().String())

	return &dns.ClientConfig{
		Servers: []string{"127.0.0.1"},
		Port:    port,
		Search:  []string{"default.svc.cluster.local", "svc.cluster.local"},
		Ndots:   5,
	}
}

// TestDig queries names with the arguments of the suite.
func TestDig(t *testing.T) {
	const prefix = ".default.svc.cluster.local.\t5\tIN\t"
	c := serve(t)
	for args, want := range map[string]string{
		"+notcp +noall +answer +search web A":                 "web" + prefix + "A\t10.96.0.7\n",
		"+tcp +noall +answer +search web A":                   "web" + prefix + "A\t10.96.0.7\n",
		"+short alias.default.svc.cluster.local CNAME":        "other.example.com.\n",
		"+short web.default.svc.cluster.local A":              "10.96.0.7\n",
		"+short 7.0.96.10.in-addr.arpa. PTR":                  "web.default.svc.cluster.local.\n",
		"+notcp +noall +answer +search web AAAA":              "",
		"+notcp +noall +answer web A":                         "",
		"+notcp +noall +answer +search missing.default.svc A": "",
	} {
		q, err := parseQuery(strings.Fields(args))
		if err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}

		got, err := q.answer(c)
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("dig %s: %v %s", args, err, d)
		}
	}

	for _, args := range []string{"", "+short", "+trace web", "-x 10.0.0.1", "web NONE", "@10.0.0.1 web"} {
		if q, err := parseQuery(strings.Fields(args)); err == nil {
			t.Errorf("dig %s: %+v, want an error", args, q)
		}
	}
}
