package podnet

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// hostilePlugin creates a plugin running one script for ADD and one for DEL.
func hostilePlugin(t *testing.T, add, del string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	script := "#!/bin/sh\ncd " + dir + "\ncat > stdin.$CNI_COMMAND\n" +
		"case $CNI_COMMAND in\nADD)\ntouch held\n" + add + "\n;;\nDEL)\n" + del + "\nrm -f held\n;;\nesac\n"
	if err := os.WriteFile(filepath.Join(dir, "fake"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}

	return dir
}

// TestHostilePlugins runs plugins with excessive, malformed or missing output. The pod fails with a
// short error, reservations are released, and memory and time stay bounded.
func TestHostilePlugins(t *testing.T) {
	const result = `echo '{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}]}'`
	const forever = "yes '\x1b[31mnoise'"
	for name, c := range map[string]struct{ add, del, want string }{
		"100 MiB": {"head -c 104857600 /dev/zero", "",
			"killed after printing more than 1048576 bytes"},
		"without end": {forever, "", "killed after printing more than 1048576 bytes"},
		"without end, and a child": {forever + " & echo $! > child; wait", "",
			"killed after printing more than 1048576 bytes"},
		"errors without end": {forever + " >&2", "", "killed after a timeout of"},
		"100 MiB of errors":  {"head -c 104857600 /dev/zero >&2; exit 3", "", "exit status 3"},
		"an error of 1 MB": {`printf '{"code":7,"msg":"'; head -c 1000000 /dev/zero | tr '\0' x; printf ` +
			`'"}'; exit 1`, "", "CNI error 7: xxx"},
		"an error of other bytes": {`printf '{"code":7,"msg":"\377\376\\u001b[2J\\u202e"}'; exit 1`, "",
			"CNI error 7"},
		"errors of other bytes": {`printf '\377\376\033[2J' >&2; exit 1`, "", "standard error"},
		"garbage":               {`printf '\377\376\033[2J'`, "", "output is not JSON"},
		"nothing":               {"true", "", "output is not JSON"},
		"a null":                {"echo null", "", "assigned no address"},
		"a hostile interface": {`echo '{"cniVersion":"0.4.0","interfaces":[null],"ips":[{"version":"4",` +
			`"address":"10.1.2.3/24"}]}'`, "", "is not a valid interface name"},
		"a hostile address": {`echo '{"cniVersion":"0.4.0","ips":[{"version":"4","address":"0.0.0.0/0"}]}'`, "",
			"is not a valid pod address"},
		"no end":                    {"sleep 1000 & echo $! > child; wait", "", "killed after a timeout of"},
		"a child that holds output": {"sleep 1000 & echo $! > child; " + result, "", ""},
		"garbage from DEL":          {"exit 1", `printf '\377\376\033[2J'`, "exit status 1"},
		"without end from DEL":      {"exit 1", "head -c 104857600 /dev/zero", "exit status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			bin, conf := hostilePlugin(t, c.add, c.del), t.TempDir()
			writeConf(t, filepath.Join(conf, "10.conflist"), "net", "1.0.0")
			n := newCNI(t, conf, bin, t.TempDir())
			n.attach.timeout = 2 * time.Second
			p, _ := newPod(t, sandboxID)

			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			_, err := n.Add(t.Context(), p)
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			if took > 8*time.Second {
				t.Errorf("Add took %v", took)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20 {
				t.Errorf("Add allocated %d MiB", grown>>20)
			}

			child := strings.TrimSpace(readFile(filepath.Join(bin, "child")))
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				defer killChild(t, child)

				began := time.Now()
				if err := n.Del(t.Context(), p); err != nil || time.Since(began) > 5*time.Second {
					t.Errorf("DEL: %v after %v", err, time.Since(began))
				}
			} else {
				checkHostileError(t, err, c.want)
				if child != "" && !within(func() bool { return !alive(child) }) {
					t.Errorf("the plugin's child %s is still running", child)
				}

				del(t, n, p)
			}

			if _, err := os.Stat(filepath.Join(bin, "held")); err == nil || len(n.Attached()) > 0 {
				t.Errorf("not released: %v", n.Attached())
			}

			if remaining, _ := filepath.Glob(filepath.Join(n.cfg.CacheDir, "*/*")); len(remaining) > 0 {
				t.Errorf("files remain: %v", remaining)
			}
		})
	}
}

// checkHostileError requires an error with a text, of bounded size and without control characters.
func checkHostileError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("%.300v, want %q", err, want)
	}

	if s := err.Error(); len(s) > 2000 || !utf8.ValidString(s) || strings.ContainsAny(s, "\x1b\u202e") {
		t.Errorf("an error of %d bytes: %.300q", len(s), s)
	}
}

func readFile(file string) string {
	b, _ := os.ReadFile(file)
	return string(b)
}

func killChild(t *testing.T, child string) {
	t.Helper()
	if !alive(child) {
		t.Errorf("child %q does not run", child)
	}
	_ = exec.Command("kill", "-9", child).Run()
}

// plant creates files in a directory, by name and kind or content. outside is the target of links.
func plant(t *testing.T, dir, outside string, names map[string]string) {
	t.Helper()
	for name, what := range names {
		file := filepath.Join(dir, name)
		var err error
		switch what {
		case "FIFO":
			err = unix.Mkfifo(file, 0o600)
		case "link":
			err = os.Symlink(outside, file)
		case "device":
			err = os.Symlink("/dev/zero", file)
		case "directory":
			err = os.Mkdir(file, 0o700)
		case "huge":
			err = errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 1<<40))
		default:
			err = os.WriteFile(file, []byte(what), 0o600)
		}

		if err != nil {
			t.Fatal(err)
		}
	}
}

// promptly fails if do blocks, for example on a FIFO or an endless file.
func promptly(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not return", what)
	}
}

// TestHostileCache starts the daemon with damaged and planted files in libcni's cache. It sets each
// file aside and reports it, touches no other file, and can release all pods.
func TestHostileCache(t *testing.T) {
	f := newFake(t)
	first := f.network(t, "1.0.0")
	healthy, _ := newPod(t, strings.Repeat("1", 64))
	badResult, _ := newPod(t, strings.Repeat("2", 64))
	torn, _ := newPod(t, strings.Repeat("3", 64))
	for _, p := range []Pod{healthy, badResult, torn} {
		add(t, first, p)
	}

	cacheDir := first.cfg.CacheDir
	results := filepath.Join(cacheDir, "results")
	outside := plantCache(t, results, badResult.ID, torn.ID)

	var log bytes.Buffer
	var next *CNI
	f.mode("")
	promptly(t, "NewCNI", func() {
		var err error
		next, err = NewCNI(CNIConfig{
			ConfDir:  first.cfg.ConfDir,
			BinDirs:  []string{f.dir},
			CacheDir: cacheDir,
			Log:      slog.New(slog.NewJSONHandler(&log, nil)),
		})
		if err != nil {
			t.Error(err)
		}
	})
	defer next.Close()

	if ips := next.IPs(healthy.ID); len(ips) != 1 {
		t.Errorf("the healthy pod has %v", ips)
	}

	for _, p := range []Pod{badResult, torn} {
		if !strings.Contains(strings.Join(next.Attached(), " "), p.ID) || next.IPs(p.ID) != nil {
			t.Errorf("pod %s: attached %v, addresses %v", p.ID[:2], next.Attached(), next.IPs(p.ID))
		}
	}

	for _, id := range next.Attached() {
		if _, err := model.ParseContainerID(id); err != nil {
			t.Error(err)
		}
	}

	remaining, _ := os.ReadDir(results)
	if len(remaining) != 2 { // the healthy pod's entry and the directory
		t.Errorf("files remaining in the cache: %v", remaining)
	}

	if n := next.Notice(); !strings.Contains(n, "12 unusable files") ||
		!strings.Contains(n, filepath.Join(cacheDir, "set-aside")) {
		t.Errorf("notice %q", n)
	}

	if n := strings.Count(log.String(), "set aside an unusable file"); n != 12 || !utf8.Valid(log.Bytes()) {
		t.Errorf("%d log lines:\n%.2000s", n, &log)
	}

	releaseHostile(t, f, next.cfg, []Pod{healthy, badResult, torn})
	if readFile(outside) != "outside" {
		t.Error("the file outside was changed")
	}
	if got, err := ReadCache(cacheDir); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

// fourth is the ID of a pod with only hostile entries in the cache.
var fourth = strings.Repeat("4", 64)

// encodedConfig returns a valid configuration of the network net, encoded as in libcni's cache.
func encodedConfig() string {
	return base64.StdEncoding.EncodeToString([]byte(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"fake"}]}`))
}

// plantCache damages the entries of two pods and plants 10 hostile ones referring to the file
// outside.
func plantCache(t *testing.T, results, badResult, torn string) (outside string) {
	t.Helper()
	entry := func(id string) string { return filepath.Join(results, "net-"+id+"-eth0") }
	b := readFile(entry(badResult))
	outside = filepath.Join(t.TempDir(), "outside")
	if err := errors.Join(
		os.WriteFile(entry(badResult), []byte(strings.Replace(b, `"10.1.2.3/24"`, `null`, 1)), 0o600),
		os.Truncate(entry(torn), 100),
		os.WriteFile(outside, []byte("outside"), 0o600),
	); err != nil {
		t.Fatal(err)
	}

	hostile := func(network, id, name string) string {
		return fmt.Sprintf(`{"kind":"cniCacheV1","containerId":%q,"ifName":%q,"networkName":%q,"config":%q,`+
			`"result":{}}`, id, name, network, encodedConfig())
	}

	plant(t, results, outside, map[string]string{
		"net-fifo-eth0": "FIFO", "net-link-eth0": "link", "net-zero-eth0": "device", "net-huge-eth0": "huge",
		"net-empty-eth0":          "",
		"net-" + fourth + "-eth0": hostile("../../../../"+outside, fourth, "eth0"),
		"net-id-eth0":             hostile("net", "../../"+fourth, "eth0"),
		"net-if-eth0":             hostile("net", "if", "../../x"), "net-other-eth0": hostile("net", fourth, "eth0"),
		"null-ips":    `{"ips":[null]}`,
		"a directory": "directory",
	})

	return outside
}

// releaseHostile releases pods with a changed configuration after another start. The last pod's
// entry was torn, so it is released with the new configuration.
func releaseHostile(t *testing.T, f fake, cfg CNIConfig, pods []Pod) {
	t.Helper()
	writeConf(t, filepath.Join(cfg.ConfDir, "10.conflist"), "changed", "1.0.0")
	again, err := NewCNI(cfg) // finds these pods among the files set aside
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()

	for i, p := range pods {
		p.NetNS = "" // the pause process has exited, too
		if err := again.Del(t.Context(), p); err != nil {
			t.Error(err)
		}

		want := "net"
		if i == len(pods)-1 {
			want = "changed"
		}
		if !strings.Contains(f.read("stdin.DEL"), `"name":"`+want) {
			t.Errorf("pod %s was released with %s", p.ID[:2], f.read("stdin.DEL"))
		}
	}

	if err := again.Del(t.Context(), Pod{ID: fourth}); err != nil { // the pod might be ours
		t.Error(err)
	}

	if len(f.held()) > 0 || len(again.Attached()) > 0 {
		t.Errorf("held %v, attached %v", f.held(), again.Attached())
	}
}

// TestHostileJournal plants files among the records of the journal.
func TestHostileJournal(t *testing.T) {
	f := newFake(t)
	conf, cacheDir := t.TempDir(), t.TempDir()
	writeConf(t, filepath.Join(conf, "10.conflist"), "net", "1.0.0")
	pending := filepath.Join(cacheDir, "pending")
	outside := filepath.Join(t.TempDir(), "outside")
	if err := errors.Join(os.Mkdir(pending, 0o700), os.WriteFile(outside, []byte("outside"), 0o600)); err != nil {
		t.Fatal(err)
	}

	id := func(digit string) string { return strings.Repeat(digit, 64) }
	record := func(id, config string) string {
		return fmt.Sprintf(`{"containerId":%q,"config":%q,"ifName":"eth0"}`, id, config)
	}
	another := id("9")
	plant(t, pending, outside, map[string]string{
		id("1"): "FIFO", id("2"): "link", id("3"): "device", id("4"): "huge", id("5"): "",
		id("6"): record(another, encodedConfig()),
		id("7"): record(id("7"), "e30="), id("8"): "null", ".new-1": "torn", ".profile": "x", "no ID": "x",
		"a directory": "directory",
	})

	var c *CNI
	promptly(t, "NewCNI", func() { c = newCNI(t, conf, f.dir, cacheDir) })
	if got := c.Attached(); len(got) != 8 {
		t.Errorf("attached: %v", got)
	}

	for _, pod := range c.Attached() {
		// like an interrupted ADD
		if err := os.WriteFile(filepath.Join(f.dir, "held", pod), nil, 0o600); err != nil {
			t.Fatal(err)
		}

		promptly(t, "Del", func() {
			if err := c.Del(t.Context(), Pod{ID: pod}); err != nil {
				t.Error(err)
			}
		})
	}

	if len(f.held()) > 0 || len(c.Attached()) > 0 {
		t.Errorf("held %v, attached %v", f.held(), c.Attached())
	}

	remaining, _ := os.ReadDir(pending)
	if len(remaining) != 1 || readFile(outside) != "outside" {
		t.Errorf("files remain: %v, outside %q", remaining, readFile(outside))
	}
	if n := c.Notice(); !strings.Contains(n, "10 unusable files") {
		t.Errorf("notice %q", n)
	}
}

// TestHostileConfiguration plants files among the network configurations. The next valid one is
// used.
func TestHostileConfiguration(t *testing.T) {
	f := newFake(t)
	conf := t.TempDir()
	plugins := func(n int) string { return strings.Repeat(`{"type":"fake"},`, n-1) + `{"type":"fake"}` }
	list := func(name, plugins string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, name, plugins)
	}
	planted := map[string]string{
		"00.conf": "FIFO", "01.conflist": "FIFO", "02.json": "device", "03.conflist": "huge", "04.conflist": "",
		"05.conflist": "\xff\xfe",
		"06.conflist": list("../../../../tmp", plugins(1)), "07.conflist": list("net", `{"type":"../fake"}`),
		"08.conflist": list("net", "null"),
		"09.conflist": list("net", plugins(maxPlugins+1)), "10.conflist": list(strings.Repeat("n", 200), plugins(1)),
		"11.conflist": "null",
		"12.conf":     `{"cniVersion":"1.0.0","name":"a/b","type":"fake"}`,
		"13.conflist": `{"cniVersion":"1.0.0","name":"fifo"}`,
		"14.conflist": `{"cniVersion":"` + strings.Repeat("9", 1<<18) + `","name":"net","plugins":[{"type":"fake"}]}`,
		"15.conflist": `{"cniVersions":["` + strings.Repeat("x", 1<<18) +
			`"],"name":"net","plugins":[{"type":"fake"}]}`,
	}

	plant(t, conf, "", planted)
	plant(t, conf, "", map[string]string{"16.conflist": "directory", "fifo": "directory"})
	plant(t, filepath.Join(conf, "fifo"), "", map[string]string{"x.conf": "FIFO"})
	writeConf(t, filepath.Join(conf, "real"), "good", "1.0.0")
	if err := os.Symlink("real", filepath.Join(conf, "99.conflist")); err != nil { // a common setup of operators
		t.Fatal(err)
	}

	promptly(t, "NewCNI", func() {
		c := newCNI(t, conf, f.dir, t.TempDir())
		if list, _, err := c.config(); err != nil || list.Name != "good" {
			t.Fatalf("%v, %v", list, err)
		}

		if n := c.Notice(); !strings.Contains(n, "00.conf is invalid") || len(n) > 1000 {
			t.Errorf("notice %q", n)
		}
		if len(c.unused) != len(planted) {
			t.Errorf("%d invalid files, want %d", len(c.unused), len(planted))
		}

		for file, why := range c.unused {
			if len(why) > 5000 || !utf8.ValidString(why) {
				t.Errorf("%s: %d bytes: %.100q", file, len(why), why)
			}
		}

		p, _ := newPod(t, sandboxID)
		add(t, c, p)
	})

	promptly(t, "Inspect", func() {
		if all, err := Inspect(conf, func(string) error { return nil }); err != nil || len(all) != len(planted)+1 {
			t.Errorf("%d files, %v", len(all), err)
		}
	})
}

// TestArguments passes hostile values of a pod's author. They become neither additional plugin
// arguments nor free text for iptables. Invalid values of an older shim are omitted.
func TestArguments(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	p, _ := newPod(t, sandboxID)
	port := func(edit func(*runtimeapi.PortMapping)) func(*Pod) {
		m := &runtimeapi.PortMapping{HostPort: 80, ContainerPort: 80}
		edit(m)
		return func(p *Pod) { p.Ports = []*runtimeapi.PortMapping{m} }
	}

	for want, edit := range map[string]func(*Pod){
		"K8S_POD_NAME":      func(p *Pod) { p.Name = "web;IP=10.0.0.1" },
		"K8S_POD_NAMESPACE": func(p *Pod) { p.Namespace = "a=b" },
		"K8S_POD_UID":       func(p *Pod) { p.UID = "u\nIgnoreUnknown=0" },
		"config.port_mappings[0].host_ip": port(func(m *runtimeapi.PortMapping) {
			m.HostIp = "0.0.0.0/0 -j ACCEPT"
		}),
		"port_mappings[0].host_ip: \"fe80::1": port(func(m *runtimeapi.PortMapping) { m.HostIp = "fe80::1%eth0" }),
		"port_mappings[0].host_port":          port(func(m *runtimeapi.PortMapping) { m.HostPort = 65536 }),
		"port_mappings[0].container_port":     port(func(m *runtimeapi.PortMapping) { m.ContainerPort = -1 }),
		"port_mappings[0].protocol":           port(func(m *runtimeapi.PortMapping) { m.Protocol = 7 }),
		ingressAnnotation: func(p *Pod) {
			p.Annotations = map[string]string{ingressAnnotation: "1M; tc"}
		},
	} {
		t.Run(want, func(t *testing.T) {
			bad := p
			edit(&bad)
			f.mode("")
			_, err := c.Add(t.Context(), bad)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || f.calls() != "" {
				t.Errorf("%v; calls %q", err, f.calls())
			}
		})
	}

	p.Name, p.Foreign = "web;IP=10.0.0.1", true
	p.Ports = []*runtimeapi.PortMapping{{
		HostPort:      80,
		ContainerPort: 80,
		HostIp:        "-j ACCEPT",
	}, {HostPort: 81, ContainerPort: 81}}
	if err := c.Del(t.Context(), p); err != nil {
		t.Fatal(err)
	}

	if strings.Contains(f.calls(), "IP=") || strings.Contains(f.read("stdin.DEL"), "ACCEPT") ||
		!strings.Contains(f.read("stdin.DEL"), `"hostPort":81`) {
		t.Errorf("calls %s; stdin %s", f.calls(), f.read("stdin.DEL"))
	}

	if got := cleanArgs([][2]string{{"A", "b;C=d"}, {"E", "f"}, {"G=h", "i"}, {"J", "\x00"}}); len(got) != 1 ||
		got[0][0] != "E" {
		t.Errorf("%v", got)
	}
}
