package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// resolvConf configures the name servers and the search list (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// query is a command line of dig.
type query struct {
	name  string
	kind  uint16
	tcp   bool
	short bool // print the data of the records only
	full  bool // the search list does not apply
}

// parseQuery parses the arguments of dig that the suite uses. An unknown argument is an error.
func parseQuery(args []string) (query, error) {
	q := query{kind: dns.TypeA, full: true}
	for _, arg := range args {
		switch kind, known := dns.StringToType[arg]; {
		case arg == "+tcp":
			q.tcp = true
		case arg == "+short":
			q.short = true
		case arg == "+search":
			q.full = false
		case arg == "+notcp", arg == "+noall", arg == "+answer":
		case strings.HasPrefix(arg, "+"), strings.HasPrefix(arg, "-"), strings.HasPrefix(arg, "@"):
			return query{}, fmt.Errorf("dig: unknown argument %q", arg)
		case known && q.name != "":
			q.kind = kind
		case q.name == "":
			q.name = arg
		default:
			return query{}, fmt.Errorf("dig: unknown type of records %q", arg)
		}
	}

	if q.name == "" {
		return query{}, errors.New("dig: no name")
	}

	return q, nil
}

// answer returns the records of the first name of the search list that has some, one per line.
func (q query) answer(c *dns.ClientConfig) (string, error) {
	names := []string{dns.Fqdn(q.name)}
	if !q.full {
		names = c.NameList(q.name)
	}

	client := dns.Client{}
	if q.tcp {
		client.Net = "tcp"
	}

	for _, name := range names {
		message := new(dns.Msg).SetQuestion(name, q.kind)
		response, _, err := client.Exchange(message, net.JoinHostPort(c.Servers[0], c.Port))
		if err != nil {
			return "", fmt.Errorf("dig: %w", err)
		}

		if len(response.Answer) > 0 {
			return q.format(response.Answer), nil
		}
	}

	return "", nil
}

// format returns records, one per line.
func (q query) format(records []dns.RR) string {
	var b strings.Builder
	for _, r := range records {
		text := r.String()
		if q.short {
			text = strings.TrimPrefix(text, r.Header().String())
		}
		fmt.Fprintln(&b, text)
	}

	return b.String()
}

// dig prints the records of a name (dig(1)).
func dig(args []string) error {
	q, err := parseQuery(args)
	if err != nil {
		return err
	}

	c, err := dns.ClientConfigFromFile(resolvConf)
	if err != nil {
		return err
	}

	if len(c.Servers) == 0 {
		return fmt.Errorf("dig: %s has no name server", resolvConf)
	}

	out, err := q.answer(c)
	fmt.Print(out)

	return err
}

// getent prints the addresses of a host, with those of /etc/hosts (getent(1)).
func getent(args []string) error {
	if len(args) != 2 || args[0] != "hosts" {
		return fmt.Errorf("getent: the arguments are hosts NAME, not %q", args)
	}

	addresses, err := net.LookupHost(args[1])
	if err != nil {
		return err
	}

	slices.Sort(addresses)
	for _, a := range addresses {
		fmt.Printf("%-15s %s\n", a, args[1])
	}

	return nil
}
