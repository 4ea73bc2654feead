package podnet

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/utils"
)

const podNetNS = "/run/netns/pod"

// ofPod reports whether a sandbox is the pod's in tests of results.
func ofPod(sandbox string) bool { return sandbox == podNetNS }

// TestResultAddresses verifies that a pod has only the addresses of its own interface.
func TestResultAddresses(t *testing.T) {
	const interfaces = `"interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/run/netns/pod"},
		{"name":"eth0","sandbox":"/run/netns/other"},{"name":"net1","sandbox":"/run/netns/pod"}]`
	for name, c := range map[string]struct{ in, want string }{
		"without an interface": {`{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"},{"address":"fd00::3/64"}]}`,
			"10.1.2.3 fd00::3"},
		"of version 0.2": {`{"cniVersion":"0.2.0","ip4":{"ip":"10.1.2.3/24"},"ip6":{"ip":"fd00::3/64"}}`,
			"10.1.2.3 fd00::3"},
		"of the pod's interface":  {`{` + interfaces + `,"ips":[{"interface":1,"address":"10.1.2.3/24"}]}`, "10.1.2.3"},
		"of the host's interface": {`{` + interfaces + `,"ips":[{"interface":0,"address":"10.1.2.3/24"}]}`, ""},
		"of another sandbox": {`{` + interfaces + `,"ips":[{"interface":2,"address":"10.1.2.3/24"},` +
			`{"interface":1,"address":"10.1.2.4/24"}]}`, "10.1.2.4"},
		"of another interface": {`{` + interfaces + `,"ips":[{"interface":3,"address":"10.1.2.3/24"}]}`, ""},
		"twice": {`{"ips":[{"address":"10.1.2.3/24"},{"address":"::ffff:10.1.2.3/120"},` +
			`{"address":"10.1.2.3/16"}]}`, "10.1.2.3"},
		"without its sandbox": {`{"interfaces":[{"name":"veth1"},{"name":"eth0"}],"ips":[{"interface":1,` +
			`"address":"10.1.2.3/24"}]}`, "10.1.2.3"},
		"under another name": {
			`{"interfaces":[{"name":"eth0"},{"name":"lo","sandbox":"/run/netns/pod"},{"name":"ens5",` +
				`"sandbox":"/run/netns/pod"}],"ips":[{"interface":0,"address":"10.9.9.9/24"},{"interface":1,` +
				`"address":"127.0.0.1/8"},{"interface":2,"address":"10.1.2.3/24"}]}`, "10.1.2.3",
		},
		"beside lo's": {`{"interfaces":[{"name":"lo","sandbox":"/run/netns/pod"},{"name":"eth0",` +
			`"sandbox":"/run/netns/pod"}],"ips":[{"interface":0,"address":"::1/128"},{"interface":1,` +
			`"address":"10.1.2.3/24"}]}`, "10.1.2.3"},
		"of the only other sandbox": {
			`{"interfaces":[{"name":"eth0","sandbox":"/run/netns/other"}],"ips":[{"interface":0,` +
				`"address":"10.1.2.3/24"}]}`, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := parseResult([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}

			var got []string
			for _, a := range r.addresses(ofPod) {
				got = append(got, a.String())
			}

			if strings.Join(got, " ") != c.want {
				t.Errorf("%v, want %s", got, c.want)
			}
		})
	}
}

// hostileResults returns invalid results by description.
func hostileResults() map[string]string {
	of := func(address string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","ips":[{"address":%q}]}`, address)
	}
	with := func(field, value string) string {
		return `{"cniVersion":"0.4.0","interfaces":[{"name":"eth0",` + field + `:` + value +
			`}],"ips":[{"address":"10.1.2.3/24"}]}`
	}

	return map[string]string{
		"null":   `null`,
		"a list": `[]`,
		"torn":   `{"cniVersion":"1.0.0","ips":[{"addr`,
		"null interface": `{"cniVersion":"0.4.0","interfaces":[null],"ips":[{"version":"4",` +
			`"address":"10.1.2.3/24"}]}`,
		"null IP":        `{"cniVersion":"0.4.0","ips":[null]}`,
		"null IP of 1.0": `{"cniVersion":"1.0.0","ips":[null]}`,
		"null route": `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.2.3/24"}],` +
			`"routes":[null]}`,
		"no address":        `{"cniVersion":"1.0.0","ips":[{}]}`,
		"unspecified":       of("0.0.0.0/24"),
		"unspecified, IPv6": of("::/64"),
		"mapped":            of("::ffff:0.0.0.0/120"),
		"multicast":         of("224.0.0.1/24"),
		"multicast, IPv6":   of("ff02::1/64"),
		"broadcast":         of("255.255.255.255/32"),
		"loopback":          of("127.0.0.1/8"),
		"no prefix":         of("10.1.2.3"),
		"prefix too long":   of("10.1.2.3/33"),
		"negative index": `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"interface":-1,` +
			`"address":"10.1.2.3/24"}]}`,
		"index out of range": `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"interface":1,` +
			`"address":"10.1.2.3/24"}]}`,
		"huge index": `{"cniVersion":"1.0.0","ips":[{"interface":9223372036854775807,` +
			`"address":"10.1.2.3/24"}]}`,
		"index beyond int": `{"cniVersion":"1.0.0","ips":[{"interface":92233720368547758070,` +
			`"address":"10.1.2.3/24"}]}`,
		"interface with a slash": `{"cniVersion":"1.0.0","interfaces":[{"name":"../eth0"}],` +
			`"ips":[{"address":"10.1.2.3/24"}]}`,
		"interface too long": `{"cniVersion":"1.0.0","interfaces":[{"name":"0123456789abcdef"}],` +
			`"ips":[{"address":"10.1.2.3/24"}]}`,
		"interface with an escape": `{"cniVersion":"1.0.0","interfaces":[{"name":"\u001b[31m"}],` +
			`"ips":[{"address":"10.1.2.3/24"}]}`,
		"sandbox with an escape": with(`"sandbox"`, `"\u001b[2J"`),
		"sandbox too long":       with(`"sandbox"`, `"`+strings.Repeat("x", maxResultText+1)+`"`),
		"negative mtu":           with(`"mtu"`, `-1`),
		"gateway with a zone":    `{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24","gateway":"fe80::1%x"}]}`,
		"invalid version":        `{"cniVersion":"1.0.0; x","ips":[{"address":"10.1.2.3/24"}]}`,
		"too many IPs": `{"cniVersion":"1.0.0","ips":[` + strings.Repeat(`{"address":"10.1.2.3/24"},`,
			maxIPs) + `{"address":"10.1.2.3/24"}]}`,
		"too many interfaces": `{"cniVersion":"1.0.0","interfaces":[` +
			strings.Repeat(`{"name":"eth0"},`, maxInterfaces) + `{"name":"eth0"}],"ips":[{"address":"10.1.2.3/24"}]}`,
		"too many routes": `{"cniVersion":"1.0.0","routes":[` + strings.Repeat(`{"dst":"::/0"},`, maxRoutes) +
			`{"dst":"::/0"}],"ips":[{"address":"10.1.2.3/24"}]}`,
		"too deep":      strings.Repeat(`{"ips":`, 20000),
		"a huge number": `{"cniVersion":` + strings.Repeat("9", 1<<19) + `}`,
		"no UTF-8":      "{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"\xff\xfe\"}]}",
	}
}

// TestHostileResults verifies that each result fails with a short error and does not reach libcni.
func TestHostileResults(t *testing.T) {
	for name, in := range hostileResults() {
		t.Run(name, func(t *testing.T) {
			r, err := parseResult([]byte(in))
			if name == "null" { // an empty result without addresses
				if err != nil || len(r.addresses(ofPod)) > 0 {
					t.Errorf("%v", err)
				}
				return
			}

			if err == nil {
				t.Fatalf("accepted: %+v", r)
			}

			if r != nil || len(err.Error()) > 6*maxExcerpt || !utf8.ValidString(err.Error()) ||
				strings.ContainsRune(err.Error(), '\x1b') {
				t.Errorf("%+v, error of %d bytes: %.200q", r, len(err.Error()), err)
			}
		})
	}
}

// FuzzCNIResult parses arbitrary plugin output. Accepted results have valid addresses and bounded
// names, survive a round trip, and are safe for libcni in every version.
func FuzzCNIResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","interfaces":[{"name":"veth1","mac":"aa:bb:cc:dd:ee:ff"},{"name":"eth0",` +
		`"sandbox":"/run/netns/pod"}],"ips":[{"interface":1,"address":"10.1.2.3/24","gateway":"10.1.2.1"}],` +
		`"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1"}],"dns":{"nameservers":["10.0.0.10"]}}`))
	f.Add([]byte(`{"cniVersion":"0.2.0","ip4":{"ip":"10.1.2.3/24","gateway":"10.1.2.1",` +
		`"routes":[{"dst":"0.0.0.0/0"}]}}`))
	f.Add([]byte(`{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.2.3/24"}]}`))
	for _, in := range hostileResults() {
		if len(in) < 1<<12 {
			f.Add([]byte(in))
		}
	}

	f.Fuzz(func(t *testing.T, out []byte) {
		r, err := parseResult(out)
		if err != nil {
			if !utf8.ValidString(err.Error()) || len(err.Error()) > 10*maxExcerpt {
				t.Fatalf("error of %d bytes: %.200q", len(err.Error()), err)
			}
			return
		}

		ips := r.addresses(ofPod)
		for i, a := range ips {
			if !isPodAddress(a) || a.Is4In6() || slices.Contains(ips[:i], a) {
				t.Errorf("address %s of %q", a, out)
			}
		}

		if len(ips) > maxIPs+2 || len(r.Interfaces) > maxInterfaces || len(r.Routes) > maxRoutes {
			t.Errorf("%d addresses, %d interfaces, %d routes", len(ips), len(r.Interfaces), len(r.Routes))
		}

		for _, i := range r.Interfaces {
			if utils.ValidateInterfaceName(i.Name) != nil || filepath.Base(i.Name) != i.Name {
				t.Errorf("interface %q", i.Name)
			}
		}

		checked, err := checkedResult(out)
		if err != nil {
			t.Fatalf("rejected after parsing: %v", err)
		}

		again, err := parseResult(checked)
		if err != nil || !slices.Equal(again.addresses(ofPod), ips) {
			t.Fatalf("%q became %q: %v", out, checked, err)
		}

		result, err := create.CreateFromBytes(checked) // must not panic
		if err != nil {
			return
		}

		for _, version := range []string{"0.2.0", "0.4.0", "1.0.0"} {
			_, _ = result.GetAsVersion(version) // must not panic
		}

		if ofLibcni, err := podAddresses(result, podNetNS); err == nil && !slices.Equal(ofLibcni, ips) {
			t.Errorf("libcni has %v of %q, not %v", ofLibcni, out, ips)
		}
	})
}

// TestResultKeepsItsFields verifies that all fields of the specification reach libcni.
func TestResultKeepsItsFields(t *testing.T) {
	const in = `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","mtu":1400,` +
		`"sandbox":"/run/netns/pod","socketPath":"/s","pciID":"0000:00:1f.6"}],` +
		`"ips":[{"interface":0,"address":"10.1.2.3/24","gateway":"10.1.2.1"}],` +
		`"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1","mtu":1300,"advmss":1260,"priority":7,"table":8,"scope":0}],` +
		`"dns":{"nameservers":["10.0.0.10"],"domain":"d","search":["s"],"options":["o"]}}`

	out, err := checkedResult([]byte(in))
	if err != nil || string(out) != in {
		t.Errorf("%v\n got %s\nwant %s", err, out, in)
	}

	var unknown map[string]json.RawMessage
	out, err = checkedResult([]byte(`{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}],"other":[[[1]]]}`))
	if err != nil || json.Unmarshal(out, &unknown) != nil || unknown["other"] != nil {
		t.Errorf("%s, %v", out, err)
	}

	if a, err := podAddresses(nil, ""); err == nil || a != nil {
		t.Errorf("without a result: %v, %v", a, err)
	}
}

// TestExcerpt verifies that foreign text becomes one bounded line of valid text.
func TestExcerpt(t *testing.T) {
	for in, want := range map[string]string{
		"\xff\x1b[2J a\n\t b": "\uFFFD [2J a b",
		"a\u202eb":            "a b",
		"":                    "",
	} {
		t.Run(fmt.Sprintf("%q", in), func(t *testing.T) {
			if got := excerpt([]byte(in)); got != want {
				t.Errorf("excerpt of %q is %q, want %q", in, got, want)
			}
		})
	}

	if got := excerpt([]byte(strings.Repeat("ä", 1<<20))); len(got) > maxExcerpt || !utf8.ValidString(got) {
		t.Errorf("%d bytes", len(got))
	}
}
