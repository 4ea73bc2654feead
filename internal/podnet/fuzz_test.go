package podnet

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// checkedList fails if a configuration has an unsafe network or plugin name.
func checkedList(t *testing.T, list *libcni.NetworkConfigList) {
	t.Helper()
	if filepath.Base(list.Name) != list.Name || !filepath.IsLocal(list.Name) || len(list.Name) > maxNetworkName {
		t.Errorf("network %q", list.Name)
	}
	if len(list.Plugins) == 0 || len(list.Plugins) > maxPlugins {
		t.Errorf("%d plugins", len(list.Plugins))
	}

	for _, name := range requiredPlugins(list) {
		if strings.ContainsAny(name, "/\x00\n\x1b") {
			t.Errorf("plugin %q", name)
		}
	}
}

// FuzzCacheEntry writes a file with any name and content to libcni's cache and the journal.
// Accepted entries refer to no other file, rejected ones are set aside once, and no other file is
// touched.
func FuzzCacheEntry(f *testing.F) {
	config, _ := json.Marshal([]byte(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"fake"}]}`))
	entry := func(network, id, result string) []byte {
		return []byte(`{"kind":"cniCacheV1","containerId":"` + id + `","config":` + string(config) +
			`,"ifName":"eth0","networkName":"` + network +
			`","netns":"/run/netns/pod","cniArgs":[["A","b;C=d"]],"result":` + result + `}`)
	}

	const result = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/pod"}],` +
		`"ips":[{"interface":0,"address":"10.1.2.3/24"}]}`
	f.Add("net-"+sandboxID+"-eth0", entry("net", sandboxID, result))
	f.Add("net-"+sandboxID+"-eth0", entry("net", sandboxID, `{"ips":[null]}`))
	f.Add("net-"+sandboxID+"-eth0", entry("../../net", sandboxID, result))
	f.Add("net-"+sandboxID+"-eth0", []byte(result))
	f.Add(sandboxID, []byte(`{"containerId":"`+sandboxID+`","config":`+string(config)+`,"ifName":"eth0"}`))
	f.Add(sandboxID, []byte(`{"containerId":"../../outside","config":`+string(config)+`,"ifName":"../x"}`))
	f.Add("x", []byte("\xff"))
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		if name == "" || len(name) > 200 || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			return // not a file name
		}

		dir := t.TempDir()
		for _, sub := range []string{"results", "pending"} {
			if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, sub, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}

		outside := filepath.Join(dir, "outside")
		if err := os.WriteFile(outside, []byte("outside"), 0o600); err != nil {
			t.Fatal(err)
		}

		var log bytes.Buffer
		a, err := newAttacher(nil, dir, nil, nil, slog.New(slog.NewJSONHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}

		if !utf8.Valid(log.Bytes()) || log.Len() > 32<<10 {
			t.Errorf("%d bytes of the log: %.500q", log.Len(), log.Bytes())
		}

		entries, err := a.cache.entries("")
		if err != nil {
			t.Fatal(err)
		}

		checkEntries(t, name, entries)
		checkRecords(t, a.journal)
		for _, id := range a.attached() {
			if id != sandboxID && !strings.Contains(name, id) {
				t.Errorf("attached %q by file %q", id, name)
			}
		}

		if b, err := os.ReadFile(outside); err != nil || string(b) != "outside" {
			t.Errorf("the file outside has %q, %v", b, err)
		}

		second, _ := a.cache.entries("")
		if aside := a.cache.aside; len(second) != len(entries) || aside > 2 {
			t.Errorf("%d entries, then %d; %d set aside", len(entries), len(second), aside)
		}
	})
}

// checkEntries fails if an entry is used under another name.
func checkEntries(t *testing.T, name string, entries []*entry) {
	t.Helper()
	for _, e := range entries {
		checkedList(t, e.list)
		if filepath.Base(name) != e.Network+"-"+e.ContainerID+"-"+e.IfName {
			t.Errorf("file %q is used for %q, %q, %q", name, e.Network, e.ContainerID, e.IfName)
		}

		for _, arg := range e.runtime().Args {
			if strings.ContainsAny(arg[0]+arg[1], ";=\x00") {
				t.Errorf("argument %q", arg)
			}
		}

		for _, ip := range e.addresses() {
			if !isPodAddress(ip) {
				t.Errorf("address %s", ip)
			}
		}
	}
}

// checkRecords fails if a record is used for another pod.
func checkRecords(t *testing.T, j journal) {
	t.Helper()
	for _, id := range j.list() {
		r, err := j.read(id)
		if err != nil {
			t.Fatal(err)
		}

		if r != nil {
			checkedList(t, r.list)
			if r.ContainerID != id {
				t.Errorf("record %q of %q", r.ContainerID, id)
			}
		}
	}
}

// FuzzNetworkConfig reads any network configuration, as a list or as a single plugin.
func FuzzNetworkConfig(f *testing.F) {
	for _, in := range []string{
		`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","ipam":{"type":"host-local"}},` +
			`{"type":"portmap"}]}`,
		`{"cniVersion":"0.3.1","name":"net","type":"bridge"}`, `{"cniVersion":"1.1.0","cniVersions":["0.4.0",` +
			`"9.9.9"],"name":"net","disableGC":"true"}`,
		`{"name":"../../x","plugins":[{"type":"../x"}]}`, `{"name":"net","plugins":[null]}`, `{"name":7}`, `null`, `[]`,
		"\xff",
	} {
		f.Add([]byte(in), true)
		f.Add([]byte(in), false)
	}

	f.Fuzz(func(t *testing.T, content []byte, isList bool) {
		file := filepath.Join(t.TempDir(), map[bool]string{true: "10.conflist", false: "10.conf"}[isList])
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}

		list, err := readConfig(file)
		if err != nil {
			if s := err.Error(); !utf8.ValidString(s) || len(s) > 5000 || strings.ContainsRune(s, '\x1b') {
				t.Errorf("an error of %d bytes: %.300q", len(s), s)
			}
			return
		}

		checkedList(t, list)
	})
}

// FuzzSysctl checks accepted parameters: the path stays below net/, and the value is one printable
// line.
func FuzzSysctl(f *testing.F) {
	for _, name := range []string{"net.core.somaxconn", "net/ipv4/conf/eth0.1/forwarding",
		"net.ipv4.conf.eth0/1.forwarding", "net/../kernel/x", "net.\x00", "/net/core", "net.." + "kernel"} {
		f.Add(name, "1")
	}

	f.Fuzz(func(t *testing.T, name, value string) {
		s, err := parseSysctl(name, value)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || !utf8.ValidString(err.Error()) || len(err.Error()) > 1000 {
				t.Errorf("%.300q", err)
			}
			return
		}

		if !filepath.IsLocal(s.path) || filepath.Clean(s.path) != s.path || !strings.HasPrefix(s.path, "net/") ||
			strings.ContainsAny(s.path, " \n\x00\\") {
			t.Errorf("%q is %q", name, s.path)
		}

		if strings.ContainsAny(s.value, "\n\x00\x1b") || len(s.value) > maxSysctlValue {
			t.Errorf("value %q", s.value)
		}
	})
}
